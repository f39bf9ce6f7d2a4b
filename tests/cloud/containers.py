"""Real container processes: an interpreter without this project, and a folder with what the client uploaded."""

import atexit
import os
import shutil
import signal
import sysconfig
import tempfile
import venv
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

from modal_proto import api_pb2

from tests.cloud.objects import Function, Input
from tests.support.forking import Forked, Forker
from tests.support.processes import environment

CALLER = "x-offline-container"
"""Header of every call a container makes: most of the protocol's requests do not say who sends them."""

LOGS = ("stdout", "stderr")


def make_interpreter(folder: Path) -> Path:
    """A Python with the packages of the running one and without its editable installs, so without this project.

    A folder named in a .pth file is added to the path, the .pth files inside it are not read: those are what makes
    an editable install importable, and with it an app whose files were never uploaded.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (own / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


NEEDED = ("modal", "httpx", "numpy", "PIL.Image", "pydantic_settings", "structlog", "tenacity")
"""By a container, of packages: this project is what the client uploaded."""


@cache
def interpreter() -> tuple[Path, Forker]:
    """Such a Python for as long as this process, and what forks it."""
    folder = Path(tempfile.mkdtemp(prefix="python-of-containers-"))
    python = make_interpreter(folder)
    started = Forker(NEEDED, environment(MODAL_CONFIG_PATH="/nowhere"), python=python)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(started.close)
    return python, started


class Container:
    """One process of `modal._container_entrypoint`, in a session of its own. Its id is Modal's task id."""

    def __init__(self, id_: str, function: Function, folder: Path) -> None:
        self.id = id_
        self.function = function
        self.folder = folder
        self.root = folder / "root"  # /root, which is where it starts
        self.running: dict[str, Input] = {}  # by input id
        self.cancelled: set[str] = set()  # input ids it has not been told of yet
        self.is_preempted = False
        self.is_leaving = False  # was told to go, in whatever way: it gets no more inputs
        self.idle_since = 0.0
        self.failure: api_pb2.GenericResult | None = None  # why it never got as far as an input
        self.exit_code: int | None = None  # None while it runs
        self.pid: int | None = None  # None until it is started
        self.environment: dict[str, str] = {}  # what it was started with
        for inside in (self.root, folder / "tmp"):
            inside.mkdir(parents=True)
        for log in LOGS:
            (folder / log).touch()

    def place(self, path: str, content: bytes) -> None:
        """A file at an absolute path inside."""
        file = self.folder / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    def files(self) -> list[str]:
        """Absolute paths inside, of everything that was uploaded or written."""
        ours = {"arguments", *LOGS}
        found = (it.relative_to(self.folder).as_posix() for it in self.folder.rglob("*") if it.is_file())
        return sorted(f"/{it}" for it in found if it not in ours)

    def start(self, arguments: api_pb2.ContainerArguments, *environments: Mapping[str, str]) -> Forked:
        """Starts it; of what several environments set, the last counts."""
        python, started = interpreter()
        (self.folder / "arguments").write_bytes(arguments.SerializeToString())
        system = {
            "PATH": f"{python.parent}{os.pathsep}{os.defpath}",
            "HOME": str(self.root),
            "TMPDIR": str(self.folder / "tmp"),
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
        }
        self.environment = _merged(
            [
                system,
                *environments,
                {
                    "PYTHONPATH": f"{self.root}{os.pathsep}{self.folder / 'pkg'}",
                    "MODAL_IS_REMOTE": "1",
                    "MODAL_TASK_ID": self.id,
                    "MODAL_IMAGE_ID": self.function.definition.image_id,
                    "MODAL_CONTAINER_ARGUMENTS_PATH": str(self.folder / "arguments"),
                    "MODAL_OVERRIDE_HEADERS": f"{CALLER}:{self.id}",
                    "MODAL_HEARTBEAT_INTERVAL": "1",  # it hears of cancellations this way
                },
            ]
        )
        out_path, err_path = (self.folder / log for log in LOGS)
        with out_path.open("wb") as out, err_path.open("wb") as err:
            command = ("-m", "modal._container_entrypoint")
            process = started.start(command, self.root, self.environment, out.fileno(), err.fileno())
        self.pid = process.pid
        return process

    def interrupt(self) -> None:
        """SIGINT to its main process, which is how Modal takes a machine back."""
        if self.pid is not None and self.exit_code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL for it and all its children: a container takes everything in it along."""
        if self.pid is not None:  # 0 would be this process's own group
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def logs(self) -> str:
        """What it wrote to stdout, then what it wrote to stderr."""
        return self.stdout() + (self.folder / "stderr").read_text(errors="replace")

    def stdout(self) -> str:
        """What it printed."""
        return (self.folder / "stdout").read_text(errors="replace")


def _merged(environments: Iterable[Mapping[str, str]]) -> dict[str, str]:
    return {name: value for environment in environments for name, value in environment.items()}
