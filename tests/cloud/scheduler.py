"""Who works on what: inputs wait, containers start and end as Modal's do, and take inputs while they have room."""

import asyncio
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from modal_proto import api_pb2

from tests.cloud.containers import Container
from tests.cloud.objects import App, Function, Image, Input, Mount, Secret

UNLIMITED = 8
"""Containers of a function that sets no limit: Modal has more of them than the machine tests run on."""

POLL_S = 0.5
END_POLL_S = 0.02
"""How long a container is left waiting at most, so that it notices what nobody announced."""

Result = api_pb2.GenericResult
SUCCESS, FAILURE, TERMINATED = (
    Result.GENERIC_STATUS_SUCCESS,
    Result.GENERIC_STATUS_FAILURE,
    Result.GENERIC_STATUS_TERMINATED,
)


@dataclass
class Settings:
    """What a test may choose."""

    idle_s: float = 0.5  # until an idle container is ended: scaledown windows of apps are too long to wait for
    max_restarts: int = 2  # crashes in a row a function recovers from; Modal itself goes on without end
    environment: Mapping[str, str] = field(default_factory=dict)  # of containers, over what the app sets


class Scheduler:
    """Lives on one event loop, and is touched on no other thread."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.settings = settings
        self.url = ""
        self.apps: dict[str, App] = {}
        self.secrets: dict[str, Secret] = {}
        self.images: dict[str, Image] = {}
        self.mounts: dict[str, Mount] = {}
        self.volumes: dict[str, str] = {}  # names by id
        self.uploads: dict[str, bytes] = {}  # contents by hash
        self.functions: dict[str, Function] = {}
        self.inputs: dict[str, Input] = {}
        self.containers: dict[str, Container] = {}
        self.complaints: list[str] = []  # what no test should pass over in silence
        self.is_closing = False
        self._counters = Counter()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task] = set()

    def new_id(self, kind: str) -> str:
        """`fu-1`, `fu-2`: the client looks at what is before the dash."""
        self._counters[kind] += 1
        return f"{kind}-{self._counters[kind]}"

    async def wait(self, limit_s: float) -> None:
        """Until something changes, or the limit."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), limit_s)

    def changed(self) -> None:
        """Wakes whoever waits, and starts the containers that are wanted now."""
        self._changed.set()
        self._changed = asyncio.Event()
        for function in self.functions.values():
            if function.crashes_in_a_row > self.settings.max_restarts:
                self._give_up(function)
            while not self.is_closing and len(function.live) < self._wanted(function):
                self._start(function)

    def _wanted(self, function: Function) -> int:
        app, settings = function.app, function.definition.autoscaler_settings
        is_published = function.params or function.id in app.function_ids.values()
        if app.is_over or not is_published or function.crashes_in_a_row > self.settings.max_restarts:
            return 0
        demand = len(function.waiting) + sum(len(it.running) for it in function.live)
        per_container = function.definition.target_concurrent_inputs or function.slots
        wanted = max(ceil(demand / per_container), settings.min_containers)
        return min(wanted, settings.max_containers or UNLIMITED)

    # ------------------------------------------------------------ inputs

    def put(self, item: Input) -> None:
        """A new call."""
        self.inputs[item.id] = item
        item.function.waiting.append(item)
        self.changed()

    def of_call(self, call_id: str) -> Input:
        """The one input of a call."""
        return next(it for it in self.inputs.values() if it.call_id == call_id)

    async def take(self, container: Container) -> Input | None:
        """An input for a container with room; None when it has been idle for long, or has to go."""
        function, now = container.function, asyncio.get_running_loop().time
        container.idle_since = now()
        while not container.is_leaving:
            if function.waiting:
                item = function.waiting.popleft()
                item.state = "running"
                item.containers.append(container)
                container.running[item.id] = item
                self.changed()
                return item
            left_s = container.idle_since + self.settings.idle_s - now()
            spare = len(function.live) > function.definition.autoscaler_settings.min_containers
            if not container.running and left_s <= 0 and (spare or function.app.is_over):
                break
            await self.wait(min(max(left_s, 0.01), POLL_S))
        container.is_leaving = True
        return None

    def finish(self, container: Container, output: api_pb2.FunctionPutOutputsItem) -> None:
        """The end a container reports. A preempted one that let go of an input has not ended it."""
        item = container.running.get(output.input_id)
        status = output.result.status
        if item is None or (container.is_preempted and status == TERMINATED and item.id not in container.cancelled):
            return
        del container.running[item.id]
        container.idle_since = asyncio.get_running_loop().time()
        container.function.crashes_in_a_row = 0
        item.data_format = output.data_format
        if status == FAILURE and item.retries < item.function.definition.retry_policy.retries:
            item.retries += 1
            self._put_back(item)
        else:
            self._end(item, output.result)
        self.changed()

    def cancel(self, call_id: str) -> None:
        """Waiting inputs end, running ones are told of with the next heartbeat of their container."""
        for item in [it for it in self.inputs.values() if it.call_id == call_id]:
            if item.state == "waiting":
                item.function.waiting.remove(item)
                self._end(item, Result(status=TERMINATED, exception="cancelled"))
            elif item.state == "running":
                item.containers[-1].cancelled.add(item.id)
        self.changed()

    def _put_back(self, item: Input) -> None:
        item.state = "waiting"
        item.function.waiting.appendleft(item)  # under its old id

    def _end(self, item: Input, result: Result) -> None:
        item.result = result
        item.state = {SUCCESS: "succeeded", TERMINATED: "cancelled"}.get(result.status, "failed")

    def _give_up(self, function: Function) -> None:
        last = next(it for it in reversed(function.containers) if it.exit_code is not None)
        if function.waiting:
            how = f"{function.name}: a crash loop, {function.crashes_in_a_row} in a row"
            self.complaints.append(f"{how}\n{last.logs()[-2000:]}")
        result = last.failure or Result(status=FAILURE, exception=f"the container exited with {last.exit_code}")
        while function.waiting:
            self._end(function.waiting.popleft(), result)

    # ------------------------------------------------------------ containers

    def _start(self, function: Function) -> None:
        id_ = self.new_id("ta")
        container = Container(id_, function, self.folder / "containers" / id_)
        self.containers[id_] = container
        function.containers.append(container)
        task = asyncio.get_running_loop().create_task(self._live(container))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _live(self, container: Container) -> None:
        function = container.function
        for mount_id in function.definition.mount_ids:
            for path, digest in self.mounts[mount_id].files.items():
                container.place(path, self.uploads[digest])
        image_env = {}
        for image in self.layers(function.definition.image_id):
            image_env |= image.env()
            for path, content in self._copied(image).items():
                container.place(path, content)
        arguments = api_pb2.ContainerArguments(
            task_id=container.id,
            function_id=function.id,
            app_id=function.app.id,
            function_def=function.definition,
            serialized_params=function.params,
            environment_name="main",
            app_layout=self.layout(function.app),
        )
        secrets = [self.secrets[it].values for it in function.definition.secret_ids]
        environments = (image_env, *secrets, self.settings.environment, {"MODAL_SERVER_URL": self.url})
        process = await asyncio.to_thread(container.start, arguments, *environments)
        if self.is_closing:
            container.kill()
        while (code := process.poll()) is None:
            await asyncio.sleep(END_POLL_S)
        container.exit_code = code
        container.kill()  # children it left
        self._bury(container)

    def _bury(self, container: Container) -> None:
        function = container.function
        held = [it for it in container.running.values() if it.containers[-1] is container]
        container.running.clear()
        if container.failure or (not container.is_leaving and (held or container.exit_code)):
            function.crashes += 1
            function.crashes_in_a_row += 1
        for item in reversed(held):
            if item.id in container.cancelled:
                self._end(item, Result(status=TERMINATED, exception="cancelled"))
            else:
                self._put_back(item)
        self.changed()

    def preempt(self, container: Container, grace_s: float, *, overlap: bool) -> None:
        """SIGINT, and SIGKILL when it is not gone after its grace."""
        container.is_preempted = container.is_leaving = True
        container.interrupt()
        asyncio.get_running_loop().call_later(grace_s, self.kill, container)
        if overlap:
            for item in reversed(container.running.values()):
                self._put_back(item)
            container.running.clear()
        self.changed()

    def kill(self, container: Container) -> None:
        """SIGKILL, if it still runs."""
        container.is_leaving = True
        if container.exit_code is None:
            container.kill()

    def stop(self, app: App) -> None:
        """Ends the containers of a `modal run` that went away: idle ones at once, others like preempted ones."""
        app.is_over = True
        for function in [it for it in self.functions.values() if it.app is app]:
            function.waiting.clear()
            for container in function.live:
                container.is_leaving = True
                if container.running:
                    self.preempt(container, grace_s=5, overlap=False)
        self.changed()

    async def close(self) -> None:
        """Kills what runs, and waits for the end of it."""
        self.is_closing = True
        for container in self.containers.values():
            self.kill(container)
        await asyncio.gather(*self._tasks)

    # ------------------------------------------------------------ what containers are made of

    def layers(self, image_id: str) -> list[Image]:
        """An image with all it is built on, the base first."""
        image = self.images[image_id]
        return [*(it for base in image.recipe.base_images for it in self.layers(base.image_id)), image]

    def _copied(self, image: Image) -> dict[str, bytes]:
        """Files of an `add_local_*(copy=True)` layer, by path."""
        lines = [line.split() for line in image.recipe.dockerfile_commands]
        targets = [line[2] for line in lines if line[:2] == ["COPY", "."]]
        files = self.mounts[image.recipe.context_mount_id].files if targets else {}
        return {f"{targets[0].rstrip('/')}/{path.lstrip('/')}": self.uploads[it] for path, it in files.items()}

    def layout(self, app: App) -> api_pb2.AppLayout:
        """All objects of an app: a container finds what it depends on in here."""
        functions = [it for it in self.functions.values() if it.app is app]
        objects = [api_pb2.Object(object_id=it.id, function_handle_metadata=it.handle()) for it in functions]
        objects += [
            api_pb2.Object(object_id=it, class_handle_metadata=api_pb2.ClassHandleMetadata())
            for it in app.class_ids.values()
        ]
        objects += [
            api_pb2.Object(object_id=it, mount_handle_metadata=api_pb2.MountHandleMetadata()) for it in self.mounts
        ]
        objects += [
            api_pb2.Object(object_id=id_, volume_metadata=api_pb2.VolumeMetadata(name=name))
            for id_, name in self.volumes.items()
        ]
        objects += [api_pb2.Object(object_id=it) for it in (*self.secrets, *self.images)]
        return api_pb2.AppLayout(objects=objects, function_ids=app.function_ids, class_ids=app.class_ids)
