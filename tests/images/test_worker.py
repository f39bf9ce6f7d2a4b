"""The image of workers on any box and its compose file, as far as they can be tried without a container engine.

The Dockerfile is read, linted, and followed: what it copies is laid out in a folder, and an interpreter that does not
have this project runs there what the image would run, with the image's variables and nothing else to write to.
"""

import json
import os
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

from images import BASE, lock_of
from inference import liveness, process
from inference.leasing.taking import END_LIMIT_S
from inference.settings import Settings
from inference.settings_base import names_of
from tests.cloud.containers import make_interpreter
from tests.support import dockerfile
from tests.support.processes import KEY, Site, until

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "images" / "worker.Dockerfile"
COMPOSE = ROOT / "images" / "compose.yaml"
STEPS = dockerfile.read(DOCKERFILE.read_text())
FIELDS = {alias: name for name, field in Settings.model_fields.items() for alias in names_of(field)}
NO_SETTINGS = {"PYTHONFAULTHANDLER", "PYTHONPATH", "PYTHONUNBUFFERED", "TMPDIR"}


def find(word, containing=""):
    """The one instruction with that word and text."""
    [step] = [it for it in STEPS if it.word == word and containing in it.rest]
    return step.rest


def composed():
    """The services of the compose file, with what they share merged in."""
    return yaml.safe_load(COMPOSE.read_text())


SERVICES = composed()["services"]
each_service = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES.keys())


# The Dockerfile


def test_the_linter_has_nothing_to_say():
    """And it is told to overlook nothing."""
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    linted = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False)
    assert (linted.returncode, linted.stdout + linted.stderr) == (0, "")
    assert "hadolint ignore" not in DOCKERFILE.read_text()


def test_it_stands_on_what_the_other_images_stand_on():
    """Base by its digest, and a file of exact versions, installed by the same command."""
    assert find("FROM") == BASE
    theirs = (ROOT / "images" / "runpod.Dockerfile").read_text().replace("runpod.txt", "worker.txt")
    [install] = [it.rest for it in dockerfile.read(theirs) if "uv pip install" in it.rest]
    assert find("RUN", "uv pip install") == install
    assert lock_of("worker").name in install


def test_what_it_copies_is_there_and_is_sent():
    """No key, no history, no test."""
    for source in dockerfile.from_the_context(STEPS):
        assert (ROOT / source).exists(), source
        assert dockerfile.is_sent(source.rstrip("/"), DOCKERFILE), source
    for path in (".env", ".git/config", "images/wan.py", "tests/conftest.py", "inference/__pycache__/a.pyc"):
        assert not dockerfile.is_sent(path, DOCKERFILE), path


def test_it_does_not_run_as_root():
    """A user with a number, who owns nothing but the folders that it writes to."""
    uid, gid = map(int, find("USER").split(":"))
    made = find("RUN", "useradd")
    assert uid >= 10_000
    assert f"--uid {uid} " in made
    assert f"--gid {gid} " in made
    assert re.search(r"install -d -o worker -g worker -m 700 (.+)$", made)[1].split() == ["/data", "/logs", "/temp"]
    after = [it.word for it in STEPS[[it.word for it in STEPS].index("USER") + 1 :]]
    assert after == ["RUN", "HEALTHCHECK", "STOPSIGNAL", "CMD"]


def test_its_environment_is_one_of_settings():
    """None of them secret; and all that it writes to lies in its volumes."""
    found = dockerfile.environment(STEPS)
    assert set(found) - set(FIELDS) == NO_SETTINGS
    settings = Settings.isolated(**{FIELDS[name]: value for name, value in found.items() if name in FIELDS})
    assert settings.log_format == "human"
    for path in (settings.data_dir, settings.ledger_path, settings.log_dir, settings.temp_dir, Path(found["TMPDIR"])):
        assert path.parts[1] in {"data", "logs", "temp"}


# What it runs


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """An interpreter with the packages and without this project, and the working directory of the image."""
    folder = tmp_path_factory.mktemp("image")
    return make_interpreter(folder / "python"), dockerfile.lay_out(STEPS, dockerfile.LAST, folder / "root")


class Box:
    """Runs what the image runs, with its variables; the folders of its volumes are below another one."""

    def __init__(self, image, folder):
        self._python, self._app = image
        self.folder = folder
        for name in ("data", "logs", "temp", "tmp"):
            (folder / name).mkdir()
        (folder / "bin").mkdir()
        # The step that writes the command, followed: with this interpreter, and into this folder.
        script = find("RUN", "compileall").split("&&", 1)[1].replace("/usr/local/bin/i2v", f"{folder}/bin/i2v")
        script = script.replace("/usr/local/bin/python", str(self._python))
        subprocess.run(["sh", "-euc", script], check=True)

    def env(self, **more):
        """The image's, in these folders."""
        places = re.compile(r"^/(data|logs|temp)")
        given = {name: places.sub(rf"{self.folder}/\1", value) for name, value in ENVIRONMENT.items()}
        given |= {"PYTHONPATH": str(self._app), "PATH": f"{self.folder}/bin:{self._python.parent}:{os.defpath}"}
        return given | {"HOME": "/nowhere"} | {k: str(v) for k, v in more.items()}

    def start(self, *command, **env):
        """A process of it."""
        with (self.folder / "stderr").open("ab") as err:
            return subprocess.Popen(command, cwd=self.folder, env=self.env(**env), stdout=err, stderr=err)

    def run(self, *command, **env):
        """The same to its end."""
        return subprocess.run(
            command, cwd=self.folder, env=self.env(**env), capture_output=True, text=True, check=False, timeout=60
        )


ENVIRONMENT = dockerfile.environment(STEPS)


@pytest.fixture
def box(image, tmp_path):
    """A box with nothing on it."""
    return Box(image, tmp_path)


CHECK = json.loads(find("HEALTHCHECK").partition("CMD ")[2])
COMMAND = json.loads(find("CMD"))


def test_an_image_that_works_passes_its_own_check(box):
    """The last step of the build: without a network, a queue and a key there is nothing to complain of."""
    command = find("RUN", "--network=none").removeprefix("--network=none ")
    checked = box.run(*shlex.split(command))
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.timeout(180)
def test_a_worker_waits_for_its_queue_is_healthy_and_stops(box):
    """From its first moment: while the queue is away, when it is there, with a task; until it is told to stop."""
    with Site(box.folder / "site") as site:
        port = site.url.rpartition(":")[2]
        [item_id] = site.submit()
        site.server.kill()
        document = {"NEXT_API_URL": f"http://127.0.0.1:{port}/api", "WORKER_API_KEY": KEY, "WORKER_ID": "box-001"}
        worker = box.start(*COMMAND, **document, I2V_ENGINE="preview", POLL_INTERVAL=0.2)
        try:
            log = box.folder / "logs" / "i2v-box-001.log"
            until(lambda: log.exists() and "queue_unavailable" in log.read_text(), 30, "it found no queue")
            assert worker.poll() is None
            assert box.run(*CHECK).returncode == 0
            site.start_server()
            until(lambda: "(SUCCESS)" in log.read_text(), 40, "the task is done")
            assert [f"[STEP {number}/6]" in log.read_text() for number in range(1, 7)] == [True] * 6
            assert box.run(*CHECK).returncode == 0
        finally:
            worker.terminate()
        assert worker.wait(20) == 0
        assert log.read_text() == (box.folder / "stderr").read_text()
        assert "no worker runs here" in box.run(*CHECK).stderr
        assert site.task(item_id)["status"] == "completed"
    assert [list((box.folder / name).iterdir()) for name in ("temp", "tmp")] == [[], []]


def test_the_check_is_given_its_time():
    """Less often than the loop turns, and longer than it looks twice, on a box that is busy."""
    given = dict(re.findall(r"--([a-z-]+)=(\d+)", find("HEALTHCHECK")))
    assert int(given["timeout"]) >= liveness.SECOND_LOOK_S + 10
    assert int(given["interval"]) > 10 * process.TURN_S
    assert int(given["interval"]) < liveness.LIMIT_S


# compose.yaml


def test_it_has_what_the_specification_names():
    """Fields of compose-spec.io's services, volumes and top level that are in use here; a misspelt one is found."""
    known = {"name", "services", "volumes"}
    of_a_service = {"image", "build", "platform", "env_file", "environment", "volumes", "tmpfs", "read_only", "init"}
    of_a_service |= {"cap_drop", "security_opt", "restart", "stop_grace_period", "deploy", "logging", "profiles"}
    of_a_service |= {"command", "ports"}
    found = composed()
    assert {name for name in found if not name.startswith("x-")} == known
    for service in SERVICES.values():
        assert set(service) <= of_a_service
        assert set(service["build"]) == {"context", "dockerfile"}
        assert set(service["deploy"]) == {"resources"}
        assert set(service["deploy"]["resources"]) == {"limits"}
        assert (COMPOSE.parent / service["build"]["context"] / service["build"]["dockerfile"]).samefile(DOCKERFILE)
        named = [it.partition(":")[0] for it in service["volumes"]]
        assert set(named) == set(found["volumes"])


@each_service
def test_every_name_is_a_setting(service):
    """With a value that it takes, in places that are volumes; strings, for YAML reads some values in its own way."""
    given = service["environment"]
    assert all(isinstance(value, str) for value in given.values())
    Settings.isolated(**{FIELDS[name]: value for name, value in given.items()})
    folders = {it.partition(":")[2] for it in service["volumes"]}
    assert folders == {"/data", "/logs", "/temp"}
    paths = [value for name, value in given.items() if value.startswith("/")]
    assert len(paths) == 4
    assert all(f"/{Path(path).parts[1]}" in folders for path in paths)
    assert given.items() >= {name: ENVIRONMENT[name] for name in given if name in ENVIRONMENT}.items()


@each_service
def test_it_is_confined(service):
    """No root, no capability, nothing to write to but its volumes and a small /tmp, and not more than its share."""
    assert service["read_only"] is True
    assert service["init"] is True  # the first process of a container cannot be ended by its health check
    assert "user" not in service  # as the image says
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [it.partition(":")[0] for it in service["tmpfs"]] == ["/tmp"]
    limits = service["deploy"]["resources"]["limits"]
    assert {name: bool(limits[name]) for name in ("cpus", "memory", "pids")} == {
        "cpus": True,
        "memory": True,
        "pids": True,
    }
    assert not [it for it in service.get("ports", []) if not it.startswith("127.0.0.1:")]


@each_service
def test_it_comes_back_and_may_take_its_time_to_stop(service):
    """The grace of the image, and after it what hands back or tells that tasks failed."""
    assert service["restart"] == "unless-stopped"
    minutes = int(re.fullmatch(r"(\d+)m", service["stop_grace_period"])[1])
    assert 60 * minutes >= float(ENVIRONMENT["I2V_SHUTDOWN_GRACE"]) + 2 * END_LIMIT_S


def test_the_worker_is_what_starts_and_the_queue_is_asked_for():
    """`up` starts the image's own command; the queue is behind a profile, with a command that there is."""
    assert "profiles" not in SERVICES["worker"]
    assert "command" not in SERVICES["worker"]
    assert SERVICES["queue"]["profiles"] == ["queue"]
    assert SERVICES["queue"]["command"] == ["i2v", "up"]
    [port] = SERVICES["queue"]["ports"]
    assert port.split(":")[2] == SERVICES["queue"]["environment"]["I2V_PORT"]


def test_a_queue_with_its_page_starts(box):
    """With a key, for it listens to more than this machine; its worker is what the check looks at."""
    given = SERVICES["queue"]["environment"] | {"I2V_PORT": "0", "WORKER_API_KEY": KEY}
    places = {name: f"{box.folder}{value}" for name, value in given.items() if value.startswith("/")}
    up = box.start(*SERVICES["queue"]["command"], **(given | places))
    try:
        log = box.folder / "stderr"
        until(lambda: "[IDLE]" in log.read_text(), 30, "its worker has asked")
        assert box.run(*CHECK).returncode == 0
        assert (box.folder / "data" / "queue").is_dir()
    finally:
        up.terminate()
    assert up.wait(20) == 0
