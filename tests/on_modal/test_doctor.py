"""What `i2v doctor modal` finds before a deployment: each problem by name, and that all is well."""

import subprocess
from pathlib import Path

import pytest

from inference.on_modal import doctor
from inference.on_modal.doctor import examine_modal
from inference.settings import Settings
from tests.cloud.cloud import Cloud
from tests.support.processes import I2V

CLONE = Path(__file__).parents[2]


async def findings(folder: Path = CLONE, **settings) -> dict[str, tuple[str, str]]:
    """Verdict and text of each check."""
    found = {}
    async for each in examine_modal(lambda: Settings.isolated(**settings), folder):
        found[each.name] = (each.verdict, each.text)
    return found


@pytest.fixture(autouse=True)
def _nobody(monkeypatch, tmp_path):
    """No account of this machine is used, and none is reached."""
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(tmp_path / "absent.toml"))
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET", "MODAL_PROFILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.anyio
async def test_without_an_account():
    """Everything else is checked, and what to do is said."""
    found = await findings()
    assert list(found) == ["deployment", "gpu", "files", "modal"]
    assert [verdict for verdict, _ in found.values()] == ["ok", "ok", "ok", "FAIL"]
    assert "modal setup" in found["modal"][1]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "settings, said",
    [
        ({"modal_cron": "every minute"}, "I2V_MODAL_CRON"),
        ({"modal_cron": "* * * *"}, "five fields"),
        ({"modal_timeout_s": 1800}, "I2V_ATTEMPT_LIMIT"),
        ({"wan_preset": "5b-turbo"}, "I2V_ACCEPT_NON_COMMERCIAL"),
    ],
)
async def test_settings_that_contradict_each_other(settings, said):
    """What only a container would find out, or a bill."""
    verdict, text = (await findings(**settings))["deployment"]
    assert verdict == "FAIL"
    assert said in text


@pytest.mark.parametrize(
    "settings, verdict",
    [
        ({"modal_gpu": "L4"}, "FAIL"),
        ({"modal_gpu": "L4", "wan_preset": "5b-fast"}, "ok"),
        ({"modal_gpu": "H200:1"}, "ok"),
        ({"modal_gpu": "Z9"}, "skip"),
    ],
)
def test_a_gpu_that_is_too_small(settings, verdict):
    """It would work, slowly, and cost several times as much."""
    assert doctor._gpu(Settings.isolated(**settings)).verdict == verdict


@pytest.mark.anyio
async def test_the_wrong_folder(tmp_path):
    """The files that travel are those of a clone."""
    verdict, text = (await findings(tmp_path))["files"]
    assert verdict == "FAIL"
    assert "app.py" in text


def test_an_account_and_its_secret(tmp_path):
    """The real command line and client are asked: no secret, one with a key too few, then all that it needs."""

    def doctor(**variables):
        said = subprocess.run(
            [I2V, "doctor", "modal"],
            cwd=CLONE,
            env=cloud.env | variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return said.returncode, said.stdout + said.stderr

    url, key = {"VERCEL_API_URL": "https://x.example"}, {"WORKER_API_KEY": "k"}
    runway = {"RUNWAYML_API_SECRET": "secret-of-runway"}
    with Cloud(tmp_path / "cloud") as cloud:
        code, without = doctor()
        assert (code, "modal secret create serverless-i2v" in without) == (1, True)
        cloud.create_secret("serverless-i2v", url)
        code, short = doctor()
        assert (code, "add WORKER_API_KEY to serverless-i2v" in short) == (1, True), short
        cloud.create_secret("serverless-i2v", url | key)
        code, sound = doctor()
        assert (code, "nothing goes there" in sound) == (0, True), sound
        code, half = doctor(**runway)
        assert (code, "add RUNWAYML_API_SECRET to serverless-i2v" in half) == (1, True), half
        assert "is set here and not in the secret" in half
        cloud.create_secret("serverless-i2v", url | key | runway)
        code, other_half = doctor()
        assert (code, "is in the secret and not set here" in other_half) == (1, True), other_half
        code, both = doctor(**runway)
        assert (code, "is set here and in the secret" in both) == (0, True), both
        assert "secret-of-runway" not in half + both
