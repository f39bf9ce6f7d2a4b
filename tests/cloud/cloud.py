"""An offline Modal for tests: the real `modal` command and real containers, against a control plane on loopback."""

import asyncio
import json
import subprocess
import threading
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import Any, Self

from grpclib.server import Server
from modal._serialization import deserialize_data_format, serialize
from modal_proto import api_pb2

from tests.cloud.containers import Container, interpreter
from tests.cloud.control_plane import ControlPlane
from tests.cloud.objects import Function, Image, Input
from tests.cloud.scheduler import Settings
from tests.support.processes import environment, forker, until

CLI_LIMIT_S = 90


NEEDED = ("modal", "modal.cli.entry_point", "httpx", "numpy", "PIL.Image", "pydantic_settings", "structlog", "tenacity")
"""By the `modal` command with app.py, but for this project, of which it takes the copy in the folder it is run in."""


class Command:
    """A `modal` command that goes on beside the test; has what tests use of subprocess.Popen."""

    def __init__(self, arguments: tuple[str, ...], cwd: Path, env: Mapping[str, str], said: Path) -> None:
        said.mkdir()
        self.args = ("-m", "modal", *arguments)
        self._out, self._err = said / "out", said / "err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = forker(*NEEDED, MODAL_CONFIG_PATH="/nowhere").start(
                self.args, cwd, env, out.fileno(), err.fileno()
            )
        self.send_signal, self.kill = self._process.send_signal, self._process.kill

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it said on stdout and stderr until its end."""
        self._process.wait(timeout)
        return self._out.read_text(), self._err.read_text()


class Cloud:
    """A workspace of its own. Everything it started is gone when its block ends."""

    def __init__(
        self,
        folder: Path,
        *,
        idle_s: float = 0.5,
        max_restarts: int = 2,
        container_env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self._plane = ControlPlane(folder, Settings(idle_s, max_restarts, container_env or {}))
        self._state = self._plane.scheduler
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_open, self._may_close = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="offline modal")
        self._commands: list[Command] = []
        self.env: dict[str, str] = {}
        """For processes of users, such as the command line."""

    def __enter__(self) -> Self:
        (self.folder / "home").mkdir(parents=True)
        self._thread.start()
        assert self._is_open.wait(20), "the control plane is open"
        self.env = environment(
            HOME=self.folder / "home",
            MODAL_CONFIG_PATH=self.folder / "absent.toml",
            MODAL_SERVER_URL=self._state.url,
            MODAL_TOKEN_ID="ak-offline",
            MODAL_TOKEN_SECRET="as-offline",
            NO_COLOR=1,
            COLUMNS=200,
            PYTHONUNBUFFERED=1,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for command in self._commands:
            command.kill()
            command.communicate()
        self._loop.call_soon_threadsafe(self._may_close.set)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the control plane has closed"
        if kind is not None:
            self.show()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        server = Server([self._plane])
        await server.start("127.0.0.1", 0)
        self._state.url = f"http://127.0.0.1:{server._server.sockets[0].getsockname()[1]}"
        self._is_open.set()
        await self._may_close.wait()
        await self._state.close()
        server.close()
        await server.wait_closed()

    def _do(self, action: Any, *arguments: Any, **options: Any) -> Any:
        """Calls something on the thread that owns the state."""

        async def act() -> Any:
            found = action(*arguments, **options)
            return await found if isinstance(found, Awaitable) else found

        return asyncio.run_coroutine_threadsafe(act(), self._loop).result(20)

    def show(self) -> None:
        """What everybody said: for a test that failed."""
        for container in self._state.containers.values():
            print(f"── {container.id} {container.function.name}: exit code {container.exit_code}\n{container.logs()}")
        print("\n".join(self._state.complaints))

    # ------------------------------------------------------------ what people do

    def create_secret(self, name: str, values: Mapping[str, str]) -> None:
        """As `modal secret create --force` does, which replaces one that is there."""
        self._do(self._plane.add_secret, name, dict(values))

    def start_cli(self, *arguments: str, cwd: Path) -> Command:
        """A `modal` command that goes on beside the test."""
        said = self.folder / f"command-{len(self._commands)}"
        self._commands.append(Command(arguments, cwd, self.env, said))
        return self._commands[-1]

    def run_cli(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
        """A `modal` command, to its end: `run_cli("run", "app.py::process", "--item-id", "7", cwd=…)`."""
        command = self.start_cli(*arguments, cwd=cwd)
        stdout, stderr = command.communicate(timeout=CLI_LIMIT_S)
        return subprocess.CompletedProcess(command.args, command.returncode, stdout, stderr)

    def deploy(self, app: Path, *arguments: str) -> subprocess.CompletedProcess:
        """`modal deploy app.py`, started beside the file."""
        return self.run_cli("deploy", app.name, *arguments, cwd=app.parent)

    def fire(self, name: str) -> Input:
        """One tick of a schedule."""
        assert self.function(name).schedule, f"{name} has a schedule"
        return self.spawn(name)

    def spawn(self, name: str, *arguments: Any, **options: Any) -> Input:
        """Calls a deployed function, `dispatch`, or a method, `Model.generate`, and does not wait."""
        message = api_pb2.FunctionInput(data_format=api_pb2.DATA_FORMAT_PICKLE, method_name=name.partition(".")[2])
        if arguments or options:
            message.args = serialize((arguments, options))
        item = Input(self._state.new_id("in"), self._state.new_id("fc"), self.function(name), message)
        self._do(self._state.put, item)
        return item

    def post(self, name: str, path: str, body: bytes = b"", *, method: str = "POST", **headers: str) -> Input:
        """Calls a web endpoint and does not wait, as Modal's proxy does for whoever calls its URL.

        The scope is the one argument, pickled, and messages are streams of the call (modal-client's container_test.py).
        """
        sent = {"host": "modal.invalid", "content-length": str(len(body))} | headers
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "https",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(key.replace("_", "-").lower().encode(), value.encode()) for key, value in sent.items()],
            "client": ("203.0.113.7", 40000),
            "server": ("modal.invalid", 443),
        }
        message = api_pb2.FunctionInput(data_format=api_pb2.DATA_FORMAT_PICKLE, args=serialize(((scope,), {})))
        item = Input(self._state.new_id("in"), self._state.new_id("fc"), self.function(name), message, request=body)
        self._do(self._state.put, item)
        return item

    def answer(self, item: Input, deadline_s: float = 30) -> tuple[int, bytes]:
        """Status and body of what a web endpoint answered."""
        until(lambda: item.has_ended, deadline_s, f"{item.name} answered")
        assert item.state == "succeeded", item.error
        status = next(it["status"] for it in item.messages if it["type"] == "http.response.start")
        body = b"".join(it.get("body", b"") for it in item.messages if it["type"] == "http.response.body")
        return status, body

    def refuse_spawns(self, name: str, count: int) -> None:
        """The next calls of a function or class, from wherever, end in an error."""
        self._do(self._plane.refusals.update, {self.function(name).name: count})

    # ------------------------------------------------------------ what there is

    def function(self, name: str) -> Function:
        """The deployed function, or the class of `Model` or `Model.generate`."""
        names = {name, f"{name.partition('.')[0]}.*"}
        ids = (id_ for app in self._plane.deployed.values() for tag, id_ in app.function_ids.items() if tag in names)
        found = next(ids, None)
        assert found, f"{name} is deployed"
        return self._state.functions[found]

    @property
    def schedules(self) -> dict[str, str]:
        """Of all deployed functions that have one, by name."""
        ids = [it for app in self._plane.deployed.values() for it in app.function_ids.values()]
        functions = [self._state.functions[it] for it in ids]
        return {it.name: it.schedule for it in functions if it.schedule}

    def layers(self, name: str) -> list[Image]:
        """Of a deployed function's image, the base first. A layer that keeps its id is not built again."""
        return self._state.layers(self.function(name).definition.image_id)

    def calls(self, name: str = "") -> list[Input]:
        """Inputs in the order of their arrival: of a function, a class, a method, or all."""
        inputs = list(self._state.inputs.values())
        return [it for it in inputs if not name or name in {it.name, it.function.name, it.function.name[:-2]}]

    def containers(self, name: str = "") -> list[Container]:
        """Containers there ever were, of a function, a class, or all, in the order of their start."""
        containers = list(self._state.containers.values())
        return [it for it in containers if not name or name in {it.function.name, it.function.name[:-2]}]

    def entries(self, name: str) -> dict[Any, Any]:
        """What is in a `modal.Dict`; nothing in one that nobody used yet."""
        found = self._plane.dicts.get(f"di-{name}")
        return found.contents() if found else {}

    @property
    def complaints(self) -> list[str]:
        """Crash loops, and calls the control plane had no answer to."""
        return self._state.complaints

    def until_idle(self, deadline_s: float = 30) -> None:
        """Until no input waits or runs. Raises AssertionError for a crash loop, or an unknown call."""
        until(lambda: self.complaints or all(it.has_ended for it in self.calls()), deadline_s, "all inputs ended")
        assert not self.complaints, "\n".join(self.complaints)

    def until_running(self, item: Input, deadline_s: float = 20) -> Container:
        """Until a container works on an input; returns the container."""
        until(lambda: item.state == "running" or item.has_ended, deadline_s, f"{item.name} runs")
        assert not item.has_ended, f"{item.name} {item.state}: {item.error}"
        return item.containers[-1]

    def until_gone(self, container: Container, deadline_s: float = 20) -> int:
        """The exit code of a container."""
        until(lambda: container.exit_code is not None, deadline_s, f"{container.id} ended")
        return container.exit_code

    def run_step(self, layer: Image, *arguments: Any, **environment_: object) -> subprocess.CompletedProcess:
        """Runs the function of a `run_function` layer as a build would: with no files of ours but what was uploaded.

        `arguments` in place of those that it is built with. What layers below put into the image is not there.
        """
        function, step = layer.function, layer.recipe.build_function
        args, kwargs = deserialize_data_format(step.input.args, step.input.data_format, None)
        container = Container(f"step-{layer.id}", function, self.folder / "steps" / layer.id)
        for mount_id in function.definition.mount_ids:
            for path, digest in self._state.mounts[mount_id].files.items():
                container.place(path, self._state.uploads[digest])
        program = (
            "import importlib, json, sys; module, name, given = sys.argv[1:]; args, kwargs = json.loads(given); "
            "getattr(importlib.import_module(module), name)(*args, **kwargs)"
        )
        of, given = function.definition, json.dumps([arguments or args, {} if arguments else kwargs])
        return subprocess.run(
            [str(interpreter()[0]), "-c", program, of.module_name, of.function_name, given],
            cwd=container.root,
            env=environment(HOME=container.root, PYTHONPATH=container.root, **environment_),
            capture_output=True,
            text=True,
            timeout=CLI_LIMIT_S,
            check=False,
        )

    # ------------------------------------------------------------ what may happen

    def preempt(self, container: Container, grace_s: float = 30, *, overlap: bool = False) -> None:
        """Modal takes the machine back: SIGINT, SIGKILL after the grace. The inputs go on elsewhere, as they are.

        They do so when the container is gone; with `overlap`, at once: nothing says that Modal waits.
        """
        self._do(self._state.preempt, container, grace_s, overlap=overlap)

    def kill(self, container: Container) -> None:
        """SIGKILL, as after running out of memory or with a host that dies. The inputs go on elsewhere."""
        self._do(self._state.kill, container)

    def cancel(self, item: Input) -> None:
        """As a user does with a call."""
        self._do(self._state.cancel, item.call_id)
