"""RunPod's image and the files of its Hub, as far as they can be tried without a container engine.

The Dockerfile is read, linted, and followed: what it copies is laid out in a folder, and an interpreter that does not
have this project runs there what the image would run.
"""

import base64
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sysconfig
import tomllib
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import pytest
import torch
from packaging.requirements import Requirement
from pydantic import BaseModel, ConfigDict, Field, HttpUrl
from pydantic.alias_generators import to_camel

from images import BASE, bake, lock, lock_of
from inference import doctor
from inference.engines.wan import weights
from inference.engines.wan.presets import PRESETS
from inference.errors import SettingsError, WeightsError
from inference.media import photo
from inference.on_runpod import wire as runpod_wire
from inference.settings import Settings
from inference.settings_base import names_of
from tests.cloud.containers import make_interpreter
from tests.engines.wan.conftest import tiny_weights
from tests.engines.wan.hub import Hub, Repository
from tests.support import dockerfile

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "images" / "runpod.Dockerfile"
HUB = ROOT / ".runpod"
FETCHER, WORKER = "fetcher", dockerfile.LAST
FIELDS = {names_of(field)[0]: (name, field) for name, field in Settings.model_fields.items()}

pytestmark = pytest.mark.timeout(180)


# The Dockerfile, read


STEPS = dockerfile.read(DOCKERFILE.read_text())


def find(word: str, containing: str) -> int:
    """Where in the file the one instruction of the last stage stands."""
    [number] = [n for n, it in enumerate(STEPS) if (it.stage, it.word) == (WORKER, word) and containing in it.rest]
    return number


FETCHES = [n for n, it in enumerate(STEPS) if (it.stage, it.word) == (WORKER, "RUN") and "fetch.py" in it.rest]


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """An interpreter with the packages and without this project."""
    return make_interpreter(tmp_path_factory.mktemp("interpreter"))


@pytest.fixture(scope="module")
def app(tmp_path_factory) -> Path:
    """The working directory of the image."""
    return dockerfile.lay_out(STEPS, WORKER, tmp_path_factory.mktemp("image"))


def run(*command: object, cwd: Path, **env: object) -> subprocess.CompletedProcess[str]:
    """To its end, with nothing of this process's environment."""
    given = {"PATH": os.environ["PATH"], "HOME": str(cwd), **{name: str(value) for name, value in env.items()}}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=given, capture_output=True, text=True, check=False, timeout=120
    )


def test_the_linter_has_nothing_to_say():
    """And whatever it is told to overlook has its reason on the line before."""
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    linted = run(hadolint, "--no-color", DOCKERFILE, cwd=ROOT)
    assert (linted.returncode, linted.stdout + linted.stderr) == (0, "")
    assert dockerfile.overlooked_without_reason(DOCKERFILE) == []


def test_it_stands_on_what_the_modal_images_stand_on():
    """Base by its digest, system packages, and a file of exact versions from the same ranges."""
    assert [it.rest for it in STEPS if it.word == "FROM" and it.stage == WORKER] == [BASE]
    golden = (ROOT / "tests" / "golden" / "modal.txt").read_text()
    wanted = set(re.search(r"apt-get install -y (.+)", golden)[1].split())
    installed = re.search(r"apt-get install -y --no-install-recommends (.+?) &&", STEPS[find("RUN", "apt-get")].rest)[1]
    assert set(installed.split()) == wanted
    packages = STEPS[find("RUN", "uv pip install")].rest
    assert re.search(r"pip install \S+ \S+ uv==\d+\.\d+\.\d+ ", packages)
    assert "--require-hashes" in packages
    assert f"source=images/{lock_of('runpod').name}," in packages


def test_what_it_copies_is_there_and_is_sent():
    """The file of exceptions lets through what is copied, and nothing else: no key, no history, no test."""
    for source in dockerfile.from_the_context(STEPS):
        assert (ROOT / source).exists(), source
        assert dockerfile.is_sent(source.rstrip("/"), DOCKERFILE), source
    assert dockerfile.is_sent("inference/engines/wan/engine.py", DOCKERFILE)
    for path in (".env", ".git/config", "images/wan.py", "tests/conftest.py", "inference/__pycache__/a.pyc"):
        assert not dockerfile.is_sent(path, DOCKERFILE), path


def test_weights_lie_below_the_code():
    """Packages, weights, code; and the step that fetches is given its few modules, a token, and nothing else."""
    packages, code = find("RUN", "uv pip install"), find("COPY", "inference/")
    assert packages < FETCHES[0] < FETCHES[-1] < code
    assert not [it for it in STEPS[: FETCHES[-1]] if it.stage == WORKER and it.word in {"COPY", "ADD", "WORKDIR"}]
    for number in FETCHES:
        mounts = re.findall(r"--mount=(\S+)", STEPS[number].rest)
        assert mounts == ["type=bind,from=fetcher,target=/fetch", "type=secret,id=hf_token"]


def test_weights_are_layers_that_registries_take():
    """All steps are the same but the last, which has no limit and so finds out whether anything is missing."""
    *limited, last = [STEPS[number].rest for number in FETCHES]
    assert {step.removesuffix(" --at-most-gb 9.95") for step in limited} == {last}
    assert [*range(FETCHES[0], FETCHES[0] + len(FETCHES))] == FETCHES
    assert len(limited) * 9.95 * 2 / 3 > 72  # a third of each may stay empty, since files are not cut


def test_no_secret_stays_in_it():
    """No argument and no variable is one; they would be readable in the image's history."""
    assert not [
        name for name in dockerfile.environment(STEPS) if re.search("TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", name)
    ]


def test_it_does_not_run_as_root():
    """A user with a number, who owns neither code nor weights: everything is copied and fetched before."""
    [user] = [n for n, it in enumerate(STEPS) if it.word == "USER"]
    uid, gid = map(int, STEPS[user].rest.split(":"))
    made = STEPS[find("RUN", "useradd")].rest
    assert uid >= 10_000
    assert f"--uid {uid} " in made
    assert f"--gid {gid} " in made
    assert [it.word for it in STEPS[user + 1 :]] == ["RUN", "STOPSIGNAL", "CMD"]
    assert "--chown" not in DOCKERFILE.read_text()


def test_its_environment_is_one_of_settings():
    """Under their names, with values they take; as the Modal image, it fetches nothing at run time."""
    found = dockerfile.environment(STEPS)
    assert found["PRESET"] == FIELDS["I2V_WAN_PRESET"][1].default
    ours = {name: value for name, value in found.items() if name in FIELDS}
    assert set(found) - set(ours) == {
        "PRESET", "ACCEPT_NON_COMMERCIAL", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "PYTHONUNBUFFERED"
    }  # fmt: skip
    settings = Settings.isolated(**{FIELDS[name][0]: value for name, value in ours.items()})
    assert (settings.engine, settings.wan_preset) == ("wan", found["PRESET"])
    assert settings.runpod_init_timeout_s == Settings.model_fields["runpod_init_timeout_s"].default
    assert f" {settings.weights_dir} " in STEPS[FETCHES[-1]].rest


# What it runs


def test_what_fetches_is_all_that_fetching_takes(python, tmp_path):
    """Those modules are loaded, each of them and no other of ours: nothing else could change what comes."""
    folder = dockerfile.lay_out(STEPS, FETCHER, tmp_path)
    program = "import sys, fetch; print(*(it.__file__ for it in sys.modules.values() if getattr(it, '__file__', None)))"
    loaded = run(python, "-c", program, cwd=folder)
    assert loaded.returncode == 0, loaded.stderr
    files = set(folder.rglob("*.py"))
    assert {Path(path) for path in loaded.stdout.split() if path.startswith(str(folder))} == files


@pytest.fixture
def hub():
    """What `a14b-fast` takes from the hub, at its pinned revisions, in miniature."""
    folder, preset = tiny_weights() / "tiny-a14b", PRESETS["a14b-fast"]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    [model] = {it.repository for it in preset.components.values()}
    [loras] = {it.repository for it in preset.loras}
    light = {it.path: files.pop(f"loras/{Path(it.path).name}") for it in preset.loras}
    with Hub() as hub:
        hub._repositories = {
            model.name: Repository(model.revision, files), loras.name: Repository(loras.revision, light)
        }  # fmt: skip
        yield hub


def test_weights_are_fetched_as_the_image_fetches_them(python, hub, tmp_path):
    """With the token of the build, verified, converted, readable for the worker; a second time nothing is asked."""
    folder, target = dockerfile.lay_out(STEPS, FETCHER, tmp_path / "fetcher"), tmp_path / "weights"
    [command] = re.findall(r"python (/fetch/fetch\.py .+)", STEPS[FETCHES[-1]].rest)
    values = {"$PRESET": "a14b-fast", "$ACCEPT_NON_COMMERCIAL": "false", "/weights": target}
    values |= {"/fetch/fetch.py": folder / "fetch.py", "/run/secrets/hf_token": tmp_path / "token"}
    (tmp_path / "token").write_text("hf_token_of_a_test\n")
    arguments = [values.get(part, part) for part in shlex.split(command)]
    fetched = run(python, *arguments, "--endpoint", hub.url, cwd=tmp_path)
    assert fetched.returncode == 0, fetched.stderr
    assert fetched.stdout.count("fetching") == sum(not it.of_cdn for it in hub.requests) - 2  # listings
    assert weights.check(PRESETS["a14b-fast"], target) == []
    assert {it.authorization for it in hub.requests if not it.of_cdn} == {"Bearer hf_token_of_a_test"}
    assert "hf_token_of_a_test" not in fetched.stdout + fetched.stderr
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044 for path in target.rglob("*"))
    asked = len(hub.requests)
    (tmp_path / "token").unlink()  # as without the secret
    assert run(python, *arguments, "--endpoint", hub.url, cwd=tmp_path).returncode == 0
    assert len(hub.requests) == asked


def test_what_may_not_be_sold_is_refused(python, hub, tmp_path):
    """Unless whoever builds says that it is accepted. What is built and not fetched takes nothing from anywhere."""
    folder = dockerfile.lay_out(STEPS, FETCHER, tmp_path)

    def fetch(preset: str, accepted: str) -> subprocess.CompletedProcess[str]:
        options = ("--accept-non-commercial", accepted, "--endpoint", hub.url)
        return run(python, "fetch.py", preset, tmp_path / "weights", *options, cwd=folder)

    refused = fetch("5b-turbo", "false")
    assert refused.returncode == 1
    assert "non-commercial use only" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert fetch("tiny", "false").returncode == 0
    assert not hub.requests
    assert "non-commercial" not in fetch("5b-turbo", "true").stderr
    assert hub.requests


def image_settings(weights_dir: Path, preset: str = "tiny") -> dict[str, str]:
    """The variables of the image, with the weights of a test."""
    kept = {
        name: value
        for name, value in dockerfile.environment(STEPS).items()
        if name not in {"PRESET", "ACCEPT_NON_COMMERCIAL"}
    }
    return kept | {"I2V_WEIGHTS_DIR": str(weights_dir), "I2V_WAN_PRESET": preset}


@pytest.mark.slow
def test_an_image_that_works_passes_its_own_check(python, app, tmp_path):
    """As the user it will run as, without a network; and what it starts with can be imported."""
    [command] = [it.rest for it in STEPS[-4:] if it.word == "RUN"]
    assert command == '--network=none python bake.py check && python -c "import runpod_handler"'
    shutil.copytree(tiny_weights() / "tiny", tmp_path / "tiny")
    (tmp_path / "compiled").mkdir()
    checked = run(python, "bake.py", "check", cwd=app, **image_settings(tmp_path))
    assert checked.returncode == 0, checked.stderr


@pytest.fixture
def in_the_image(monkeypatch, tmp_path):
    """Sets the variables of an image, in this process."""

    def enter(weights_dir: Path, preset: str) -> None:
        monkeypatch.chdir(tmp_path)  # where no `.env` is
        for name, value in image_settings(weights_dir, preset).items():
            monkeypatch.setenv(name, value)

    return enter


def test_an_image_that_could_not_work_is_not_built(in_the_image, tmp_path):
    """Weights that are missing, a folder that cannot be written: a line says which."""
    in_the_image(tmp_path, "5b-fast")
    with pytest.raises(WeightsError, match=r"there are no weights of 5b-fast in .+"):
        bake.check_image()
    in_the_image(tiny_weights(), "tiny")
    with pytest.raises(SettingsError, match=r"compiled cannot be written: No such file"):
        bake.check_image()


def test_what_was_not_looked_at_is_no_reason_to_build_an_image(in_the_image, tmp_path, monkeypatch):
    """A check that the doctor has under another name some day would be missed by nobody else."""

    async def other_names(_load):
        yield doctor.Finding("packages", "ok", "")

    weights_dir = shutil.copytree(tiny_weights(), tmp_path / "weights")
    (weights_dir / "compiled").mkdir(exist_ok=True)
    in_the_image(weights_dir, "tiny")
    monkeypatch.setattr(doctor, "examine", other_names)
    with pytest.raises(SettingsError, match="extra wan: not looked at"):
        bake.check_image()


def test_weights_that_nobody_publishes_are_made(in_the_image, tmp_path):
    """For an image to try things with; of another preset nothing is."""
    assert "&& python bake.py build &&" in STEPS[find("RUN", "bake.py build")].rest
    for preset in ("a14b-fast", "tiny"):
        in_the_image(tmp_path / preset, preset)
        bake.build_unpublished()
    assert not (tmp_path / "a14b-fast").exists()
    weights.require(PRESETS["tiny"], tmp_path / "tiny")


def test_it_can_compile_what_is_added_to_it(python, app, tmp_path):
    """With the command of docs/runpod.md, from the folder that it starts in; here there are no weights yet."""
    [line] = [it for it in (ROOT / "docs" / "runpod.md").read_text().splitlines() if it.startswith("docker run")]
    command = shlex.split(line.partition(" IMAGE python ")[2])
    ran = run(python, *command, cwd=app, **image_settings(tmp_path))
    assert ran.returncode == 1
    assert "there are no weights of a14b-fast" in ran.stderr


def test_its_command_starts(python, app):
    """In the folder of the image, with what was copied there and nothing else of ours."""
    command = json.loads(STEPS[-1].rest)
    assert STEPS[-1].word == "CMD"
    assert command[0] == "python"
    started = run(python, *command[1:], "--help", cwd=app, I2V_ENGINE="preview", RUNPOD_SKIP_GPU_CHECK="true")
    assert started.returncode == 0, started.stderr
    assert "--rp_serve_api" in started.stdout


# The versions


def locked(image: str) -> dict[str, tuple[str, list[str]]]:
    """Version and hashes of every package, by its name. Fails for a line that is anything else."""
    found: dict[str, tuple[str, list[str]]] = {}
    text = re.sub(r"\\\n\s*", " ", lock_of(image).read_text())
    for line in text.splitlines():
        if not line.startswith("#"):
            entry = re.fullmatch(r"([a-z0-9-]+)==(\S+)((?: +--hash=sha256:[0-9a-f]{64})+)", line)
            assert entry, line
            assert entry[1] not in found, line
            found[entry[1]] = (entry[2], entry[3].split())
    return found


@pytest.mark.parametrize("image", lock.EXTRAS)
def test_every_requirement_has_one_version_in_its_range(image):
    """Of the base install and of the image's extras; the rest is what those need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    wanted += [it for extra in lock.EXTRAS[image] for it in project["optional-dependencies"][extra]]
    versions = locked(image)
    for requirement in map(Requirement, wanted):
        version, hashes = versions[requirement.name]
        assert version in requirement.specifier, requirement
        assert hashes
    assert versions.get("torch", ("2.13.0",))[0] == "2.13.0"


def test_all_images_have_the_same_version_of_everything():
    """What runs in one runs in the others."""
    runpod, wan, slim, worker = map(locked, lock.EXTRAS)
    assert wan.items() <= runpod.items()
    assert slim.items() <= wan.items()
    shared = worker.keys() & runpod.keys()
    assert {name: worker[name] for name in shared} == {name: runpod[name] for name in shared}
    assert not [name for name in slim | worker if name.startswith(("nvidia", "torch"))]


def test_what_is_written_of_a_package():
    """Its version, and each wheel's hash once, in an order that does not change."""
    wheels = [{"hashes": {"sha256": digest * 64}} for digest in "bab"]
    [first, rest] = lock._lines([{"name": "six", "version": "1.17.0", "wheels": wheels}])
    assert first == "six==1.17.0 \\"
    assert rest == f"    --hash=sha256:{'a' * 64} \\\n    --hash=sha256:{'b' * 64}"


# The Hub


class Shape(BaseModel):
    """As docs.runpod.io/hub/publishing-guide has it; a field it does not know is a mistake."""

    model_config = ConfigDict(strict=True, extra="forbid", alias_generator=to_camel)


class Option(Shape):
    """A value to choose."""

    label: str
    value: str


class Input(Shape):
    """A variable that whoever deploys fills in."""

    name: str
    type: Literal["string", "number", "boolean", "huggingface"]
    description: str
    default: str | int | float | bool | None = None
    options: list[Option] | None = None
    min: float | None = None
    max: float | None = None
    true_value: str | None = None
    false_value: str | None = None
    advanced: bool = False


class Variable(Shape):
    """Of the environment: a value, or one that is asked for."""

    key: str
    value: str | None = None
    input: Input | None = None


class Preset(Shape):
    """Values to fill in together."""

    name: str
    defaults: dict[str, str | int | float | bool]


CudaVersions = Annotated[list[Annotated[str, Field(pattern=r"^\d+\.\d+$")]], Field(min_length=1)]


class HubConfig(Shape):
    """What it is deployed with."""

    runs_on: Literal["GPU", "CPU"]
    container_disk_in_gb: int
    gpu_count: int
    gpu_ids: str
    allowed_cuda_versions: CudaVersions
    env: list[Variable]
    presets: list[Preset]


class Listing(Shape):
    """hub.json."""

    title: str
    description: str
    type: Literal["serverless"]
    category: Literal["audio", "embedding", "language", "video", "image"]
    icon_url: HttpUrl | None = None
    config: HubConfig


class Trial(Shape):
    """A job that has to succeed before a release is listed."""

    name: str
    input: dict[str, object]
    timeout: int  # milliseconds


class Value(Shape):
    """A variable of the trials."""

    key: str
    value: str


class TrialConfig(Shape):
    """What they run on."""

    gpu_type_id: str
    gpu_count: int
    env: list[Value]
    allowed_cuda_versions: CudaVersions


class Trials(Shape):
    """tests.json."""

    tests: list[Trial]
    config: TrialConfig


POOLS_GB = {"AMPERE_80": 80, "ADA_80_PRO": 80, "HOPPER_141": 141}
"""Memory of the GPUs of a pool (docs.runpod.io, GPU types)."""

PACKAGES_GB = 6.0
"""What `runpod.txt` takes on disk: 5.7 GB with its bytecode."""

SCRATCH_GB = 10.0
"""Photos, videos and what compilers keep; a few tasks take 1 GB (doctor.py)."""

LORA_RANK = 64  # as its name says: Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1

OF_THE_IMAGE = {"I2V_ENGINE", "I2V_WAN_PRESET", "I2V_WEIGHTS_DIR", "HF_TOKEN", "I2V_ACCEPT_NON_COMMERCIAL"}
OF_THE_MACHINE = {"WORKER_ID", "TEMP_DIR", "AUTO_CLEANUP_TEMP", "LOG_DIR", "I2V_LOG_FORMAT", "NOTIFY_SOCKET"}
OF_THE_CALLER = {"RUNPOD_API_KEY", "RUNPOD_ENDPOINT_ID", "RUNPOD_ENDPOINT_BASE_URL"}
OF_THE_CALLER |= {"I2V_RUNPOD_MAX_WORKERS", "I2V_RUNPOD_WEBHOOK", "I2V_OVERFLOW_AFTER", "I2V_OVERFLOW_WAN_LOCAL"}
OF_THE_SERVER = {"I2V_HOST", "I2V_PORT", "I2V_DATA_DIR", "I2V_DATABASE_URL", "I2V_PUBLIC_URL", "I2V_MAX_VIDEO_BYTES"}
OF_THE_SERVER |= {"I2V_RETENTION_DAYS"}
OF_PROGRESS = {"REDIS_URL", "I2V_GPU_PRICE"}
OF_A_POLLING_WORKER = {"POLL_INTERVAL", "I2V_QUEUE", "I2V_WEBHOOK_BYTES", "CALLBACK_BASE_URL"}
OF_A_POLLING_WORKER |= {"GMANIMATO_API_URL", "WORKER_TASK_SECRET", "I2V_WEBHOOK_RETRIES", "WORKER_MAX_RETRIES"}
OF_A_POLLING_WORKER |= {"I2V_JOBS_DATABASE_URL", "I2V_JOBS_TABLE", "I2V_JOBS_COLUMNS", "I2V_JOBS_STALE"}
OF_COMFYUI = {"COMFY_HOST", "I2V_COMFY_WORKFLOW", "I2V_COMFY_MAPPING", "I2V_COMFY_PATIENCE"}
OF_OTHER_PLATFORMS = re.compile("I2V_MODAL_|I2V_PUSH_|I2V_WAKE_PORT|CLOUD_TASKS_|RUNWAY|I2V_RUNWAY_|I2V_LEDGER")


@pytest.fixture
def listing() -> Listing:
    """hub.json, validated."""
    return Listing.model_validate_json((HUB / "hub.json").read_text())


@pytest.fixture
def trials() -> Trials:
    """tests.json, validated."""
    return Trials.model_validate_json((HUB / "tests.json").read_text())


def test_the_hub_finds_its_files():
    """Under the names it looks for. The Dockerfile is a copy: `cp images/runpod.Dockerfile .runpod/Dockerfile`.

    A link would not do: BuildKit follows none that leads out of its folder (github.com/docker/compose/issues/7397).
    """
    assert sorted(path.name for path in HUB.iterdir() if path.is_file()) == [
        "Dockerfile", "handler.py", "hub.json", "tests.json"
    ]  # fmt: skip
    assert not (HUB / "Dockerfile").is_symlink()
    assert (HUB / "Dockerfile").read_text() == DOCKERFILE.read_text()


def test_the_hubs_handler_is_the_worker(python, tmp_path):
    """From wherever it is started."""
    app = dockerfile.lay_out(STEPS, WORKER, tmp_path)
    shutil.copytree(HUB, app / HUB.name)
    started = run(python, app / HUB.name / "handler.py", "--help", cwd=tmp_path, I2V_ENGINE="preview")
    assert started.returncode == 0, started.stderr
    assert "--rp_serve_api" in started.stdout


def test_everything_a_worker_may_need_is_asked_for(listing):
    """Each setting is there, or is none of a worker's; what makes it work is not hidden among the rest."""
    asked = [it.key for it in listing.config.env]
    assert len(asked) == len(set(asked))
    others = OF_THE_IMAGE | OF_THE_MACHINE | OF_THE_CALLER | OF_THE_SERVER | OF_A_POLLING_WORKER | OF_COMFYUI
    others |= OF_PROGRESS
    assert others <= set(FIELDS)
    assert set(asked) == {name for name in FIELDS if name not in others and not OF_OTHER_PLATFORMS.match(name)}
    shown = {it.key for it in listing.config.env if it.input and not it.input.advanced}
    assert shown >= {"VERCEL_API_URL", "WORKER_API_KEY", "BUCKET_ENDPOINT_URL", "BUCKET_NAME"}


def choices(annotation: object) -> list[str]:
    """What a setting may be, if only some words."""
    return [
        value
        for it in (annotation, *get_args(annotation))
        if get_origin(it) is Literal
        for value in get_args(it)
    ]  # fmt: skip


def test_what_is_asked_for_is_what_settings_say(listing):
    """The same words, the same default, values that are taken."""
    for variable in listing.config.env:
        (name, field), given = FIELDS[variable.key], variable.input
        assert given is not None, variable.key
        assert given.description == field.description, variable.key
        assert (given.default if given.default != "" else None) == field.default, variable.key
        assert given.type == {bool: "boolean"}.get(type(field.default), given.type), variable.key
        assert [it.value for it in given.options or [] if it.value] == choices(field.annotation), variable.key
        offered = [given.default, given.min, given.max, given.true_value, given.false_value]
        for value in [*offered, *(it.value for it in given.options or [])]:
            if value not in {None, ""}:
                Settings.isolated(**{name: str(value)})
    for preset in listing.config.presets:
        Settings.isolated(**{FIELDS[key][0]: str(value) for key, value in preset.defaults.items()})
        assert preset.defaults["I2V_WAN_AREA"] <= PRESETS[dockerfile.environment(STEPS)["PRESET"]].max_area_px


def test_it_is_deployed_on_gpus_that_suffice(listing, trials):
    """Enough memory for the preset of the image, and a driver for the CUDA that torch was built with."""
    preset = PRESETS[dockerfile.environment(STEPS)["PRESET"]]
    assert {POOLS_GB[pool] >= preset.gpu_memory_gb for pool in listing.config.gpu_ids.split(",")} == {True}
    assert listing.config.gpu_count == trials.config.gpu_count == 1
    cuda = locked("runpod")["nvidia-cuda-runtime"][0].split(".")
    oldest = min(tuple(map(int, version.split("."))) for version in listing.config.allowed_cuda_versions)
    assert oldest == (int(cuda[0]), int(cuda[1]))
    assert trials.config.allowed_cuda_versions == listing.config.allowed_cuda_versions


def test_the_disk_has_room(listing):
    """For the weights of the image, its packages, and what tasks leave for a while."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    from tests.bench.wan_models import SHAPES

    shape = SHAPES["a14b-720p"]
    assert shape.preset.name == dockerfile.environment(STEPS)["PRESET"]
    with torch.device("meta"):
        expert = WanTransformer3DModel(**shape.configs["transformer"])
        codec = AutoencoderKLWan(**shape.configs["vae"])
        encoder = UMT5EncoderModel(UMT5Config(**shape.configs["text_encoder"]))

    def size_gb(model: torch.nn.Module, item_bytes: int) -> float:
        return sum(it.numel() for it in model.parameters()) * item_bytes / 1e9

    layers = [it for it in expert.blocks.modules() if isinstance(it, torch.nn.Linear)]
    lora_gb = sum(LORA_RANK * (it.in_features + it.out_features) for it in layers) * 4 / 1e9
    weights_gb = len(shape.experts) * (size_gb(expert, 2) + lora_gb) + size_gb(encoder, 2) + size_gb(codec, 4)
    assert 69 < weights_gb < 73
    assert listing.config.container_disk_in_gb >= weights_gb + PACKAGES_GB + SCRATCH_GB


def test_the_hubs_trial_is_a_job_we_take(trials):
    """A photo that comes along, so that nothing depends on another host, and a clip that the preset makes."""
    for trial in trials.tests:
        job = runpod_wire.parse(trial.input, worker_id="hub", lease_s=60)
        assert isinstance(job, runpod_wire.DirectInput)
        PRESETS[dockerfile.environment(STEPS)["PRESET"]].refuse(job.request)
        assert job.photo_url is None
        assert len(base64.b64decode(job.photo_base64)) < 3000
        assert trial.timeout / 1000 >= Settings.model_fields["runpod_init_timeout_s"].default
    given = {FIELDS[it.key][0]: it.value for it in trials.config.env}
    assert Settings.isolated(**given).wan_area_px < PRESETS[dockerfile.environment(STEPS)["PRESET"]].max_area_px


def test_the_hubs_photo_is_one(trials, tmp_path):
    """As a worker would look at it."""
    for number, trial in enumerate(trials.tests):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(base64.b64decode(str(trial.input["photo_base64"])))
        photo.verify(path)
