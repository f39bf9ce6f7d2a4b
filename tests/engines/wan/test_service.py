"""The engine where it is used: behind a queue, on the command line, under the doctor's eyes."""

import shutil
import signal

import pytest

from inference import doctor
from inference.build.engines import load_engine
from inference.build.queues import open_queue
from inference.build.workers import build_worker
from inference.engines.wan.presets import PRESETS
from inference.media.video import probe
from inference.progress.stages import Progress
from inference.server.client import QueueClient
from inference.settings import Settings
from tests.commands.test_main import here, home  # noqa: F401 - fixtures
from tests.engines.wan.conftest import tiny_weights
from tests.server.harness import KEY, config, running_server
from tests.support.processes import Process, until


@pytest.fixture
def weights_dir(tmp_path):
    """A copy: some of these tests change it."""
    return shutil.copytree(tiny_weights(), tmp_path / "weights")


@pytest.mark.anyio
async def test_a_task_goes_through_the_embedded_queue(tmp_path, photo, weights_dir):
    """Two photos, one engine: leased, generated, uploaded, reported; the second worker would find nothing."""
    heard: list[Progress] = []
    with running_server(config(tmp_path)) as url:
        settings = Settings.isolated(
            api_url=url, api_key=KEY, engine="wan", wan_preset="tiny", weights_dir=weights_dir, wan_area_px=96 * 64
        )
        async with QueueClient(url, KEY) as client, open_queue(settings) as queue:
            tasks = await client.submit(photo, "slow push", seconds=0.5, count=2)
            outcomes = []
            engine = await load_engine(settings)
            worker = build_worker(settings, queue, engine, sink=lambda _: heard.append, on_outcome=outcomes.append)
            for _ in tasks:
                await worker.run(at_most=1)
            assert [outcome.status for outcome in outcomes] == ["completed", "completed"]
            for task in tasks:
                path = await client.save_video(task["id"], tmp_path / f"{task['id']}.mp4")
                info = probe(path)
                assert (info.frames, info.width, info.height, info.fps) == (13, 96, 64, pytest.approx(24))
    assert {"encode", "denoise", "decode"} <= {progress.stage for progress in heard}
    assert {"encode", "denoise", "decode"} <= set(outcomes[0].stage_seconds)


def test_render_makes_a_clip_and_says_what_it_is(here, home, weights_dir):  # noqa: F811
    """Labelled as noise; the seed is told, and gives the same file."""
    arguments = ("render", "photo.jpg", "slow dolly-in", "--engine", "wan", "--preset", "tiny", "-s", "0.5")
    ran = here(*arguments, "-o", "a.mp4", I2V_WEIGHTS_DIR=weights_dir, I2V_WAN_AREA=64 * 64)
    assert ran.exit_code == 0, ran.err
    assert "wan, preset tiny: noise" in ran.err
    seed = ran.err.split("seed ")[1].split()[0]
    assert "load" in ran.err
    again = here(*arguments, "--seed", seed, "-o", "b.mp4", I2V_WEIGHTS_DIR=weights_dir, I2V_WAN_AREA=64 * 64)
    assert again.exit_code == 0
    assert (home.folder / "a.mp4").read_bytes() == (home.folder / "b.mp4").read_bytes()
    assert probe(home.folder / "a.mp4").width * probe(home.folder / "a.mp4").height <= 64 * 64
    assert home.is_tidy()


@pytest.mark.parametrize(
    "case",
    [
        ("--preset tiny -s 20", {}, "--seconds is 20; preset tiny makes 0.5 to 10 s"),
        ("--preset huge", {}, "I2V_WAN_PRESET: there is no preset 'huge'; choose one of"),
        ("--preset a14b-fast", {}, "run: i2v weights fetch a14b-fast"),
        ("--preset tiny", {"I2V_WAN_AREA": 10**9}, "I2V_WAN_AREA"),
        ("--preset tiny", {"I2V_WAN_ATTENTION": "warp"}, "I2V_WAN_ATTENTION"),
        ("--preset tiny", {"I2V_WAN_OFFLOAD": "all"}, "I2V_WAN_OFFLOAD"),
        ("--preset tiny", {"I2V_WEIGHTS_DIR": "/proc/weights"}, "I2V_WEIGHTS_DIR: /proc/weights cannot be written"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(here, home, weights_dir, case):  # noqa: F811
    """Exit 1, no traceback, nothing left behind."""
    arguments, settings, said = case
    ran = here(
        "render", "photo.jpg", "--engine", "wan", *arguments.split(), **({"I2V_WEIGHTS_DIR": weights_dir} | settings)
    )
    assert ran.exit_code == 1
    assert said in ran.errors[-1]
    assert "Traceback" not in ran.err
    assert home.is_tidy()


def test_weights_of_tiny_are_built_on_the_way(here, home):  # noqa: F811
    """By `weights fetch`, and `check` finds all there; then damage is found."""
    folder = home.folder / "weights"
    missing = here("weights", "check", "tiny", I2V_WEIGHTS_DIR=folder)
    assert missing.exit_code == 1
    assert len(missing.errors) == 1
    assert f"there are no weights of tiny in {folder}: run: i2v weights fetch tiny" in missing.errors[0]
    for _ in range(2):
        assert here("weights", "fetch", "tiny", I2V_WEIGHTS_DIR=folder).exit_code == 0
    assert here("weights", "check", "tiny", I2V_WEIGHTS_DIR=folder).exit_code == 0
    (folder / "tiny" / "vae" / "config.json").unlink()
    broken = here("weights", "check", "tiny", I2V_WEIGHTS_DIR=folder)
    assert broken.exit_code == 1
    assert "vae/config.json is missing" in broken.errors[0]


def test_an_unknown_preset_is_told_with_those_there_are(here):  # noqa: F811
    """By the command that fetches, too."""
    ran = here("weights", "fetch", "14b")
    assert (ran.exit_code, "choose one of" in ran.errors[0]) == (1, True)


def test_ctrl_c_ends_a_rendering_within_a_step(home, weights_dir):  # noqa: F811
    """Exit 130, and neither a file nor a process stays."""
    arguments = ("render", "photo.jpg", "--engine", "wan", "--preset", "tiny", "-s", "10")
    process = Process(
        home.folder,
        "render",
        *arguments,
        env=home.env(I2V_WEIGHTS_DIR=weights_dir, TORCHINDUCTOR_CACHE_DIR=home.folder),
    )
    until(lambda: "encode" in process.stderr.read_text(), 60, "it generates")
    process.send(signal.SIGINT)
    assert process.wait(15) == 130
    assert not (home.folder / "out.mp4").exists()
    assert home.is_tidy()


def test_what_cannot_be_compiled_ahead_is_one_line(here, weights_dir):  # noqa: F811
    """By whoever asks for nothing else; a worker would run without."""
    given = {"I2V_WEIGHTS_DIR": weights_dir, "I2V_WAN_AREA": 64 * 64, "I2V_WAN_OFFLOAD": "blocks"}
    ran = here("weights", "compile", "tiny", **given)
    assert ran.exit_code == 1
    assert ran.errors == ["i2v: blocks that come and go cannot be compiled"]
    assert list((weights_dir / "compiled").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told_before_the_minutes(here, weights_dir, tmp_path):  # noqa: F811
    """In one line, by its name."""
    (tmp_path / "file").touch()
    given = {"I2V_WEIGHTS_DIR": weights_dir, "I2V_WAN_COMPILED": tmp_path / "file" / "compiled"}
    ran = here("weights", "compile", "tiny", **given)
    assert ran.exit_code == 1
    assert ran.errors == [f"i2v: {tmp_path}/file/compiled cannot be written: Not a directory"]


async def findings(**settings):
    """Everything that the doctor says, by what was examined."""
    return {it.name: it async for it in doctor.examine(lambda: Settings.isolated(engine="wan", **settings))}


@pytest.mark.anyio
async def test_the_doctor_knows_what_the_engine_needs(weights_dir):
    """Weights that are not there, with the command that fetches them; a GPU, unless the preset is a tiny one."""
    found = await findings(wan_preset="tiny", weights_dir=weights_dir)
    assert (found["weights"].verdict, found["gpu"].verdict) == ("ok", "ok")
    found = await findings(wan_preset="5b-fast", weights_dir=weights_dir)
    assert found["weights"].verdict == "FAIL"
    assert "i2v weights fetch 5b-fast" in found["weights"].text
    assert found["gpu"].verdict == "FAIL"
    assert f"{PRESETS['5b-fast'].gpu_memory_gb} GB" in found["gpu"].text
