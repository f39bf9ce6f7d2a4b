"""What an app has at the offline Modal: values that requests became. Nothing in here runs."""

import shlex
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modal._serialization import deserialize, deserialize_data_format
from modal_proto import api_pb2

if TYPE_CHECKING:
    from tests.cloud.containers import Container

INLINE_BYTES = 64 << 20
"""Larger arguments and results would go through a blob store. The real limit for `.spawn` is 8 KiB."""


@dataclass
class App:
    """One deployment, or one `modal run`."""

    id: str
    name: str
    state: int
    function_ids: dict[str, str] = field(default_factory=dict)  # by tag; filled when published
    class_ids: dict[str, str] = field(default_factory=dict)
    is_over: bool = False  # a `modal run` that went away
    log_offsets: dict[str, int] = field(default_factory=dict)  # by file: what its reader has seen


@dataclass
class Secret:
    """Named and made by a person, or nameless and part of an app (`Secret.from_dict`, `env=`)."""

    id: str
    name: str
    values: dict[str, str]
    required: set[str] = field(default_factory=set)  # every key some app insisted on


@dataclass
class Image:
    """One layer. Its id follows from its recipe, so equal layers are one, as in the real cache."""

    id: str
    recipe: api_pb2.Image
    function: "Function | None" = None  # of a run_function step

    def env(self) -> dict[str, str]:
        """What its own ENV lines set."""
        found = {}
        for line in self.recipe.dockerfile_commands:
            if line.startswith("ENV "):
                found |= dict(it.split("=", 1) for it in shlex.split(line.removeprefix("ENV ")))
        return found


@dataclass
class Mount:
    """Files the client uploaded: hash by absolute path. One that has a name only belongs to Modal itself."""

    id: str
    name: str
    files: dict[str, str]


@dataclass(eq=False)
class Input:
    """One call of a function: what Modal keeps its id for, through all containers that try it."""

    id: str
    call_id: str
    function: "Function"
    message: api_pb2.FunctionInput
    index: int = 0
    invocation: int = api_pb2.FUNCTION_CALL_INVOCATION_TYPE_ASYNC
    state: str = "waiting"  # running, succeeded, failed, cancelled
    containers: list["Container"] = field(default_factory=list)  # those that took it, in order
    retries: int = 0
    result: api_pb2.GenericResult = field(default_factory=api_pb2.GenericResult)
    data_format: int = api_pb2.DATA_FORMAT_PICKLE
    request: bytes = b""  # of a call over HTTP: the body
    messages: list[dict[str, Any]] = field(default_factory=list)  # of ASGI, that answered it

    @property
    def name(self) -> str:
        """`dispatch`, or `Model.generate`."""
        return self.function.name.replace("*", self.message.method_name)

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named ones."""
        sent = self.message
        return deserialize_data_format(sent.args, sent.data_format, None) if sent.args else ((), {})

    @property
    def value(self) -> Any:
        """What it returned."""
        assert self.state == "succeeded", f"{self.name} {self.state}: {self.error}"
        return deserialize_data_format(self.result.data, self.data_format, None)

    @property
    def error(self) -> str:
        """The exception that ended it, as text."""
        return self.result.exception

    @property
    def has_ended(self) -> bool:
        """Whether nobody is going to work on it any more."""
        return self.state not in {"waiting", "running"}


@dataclass(eq=False)
class Function:
    """A function, or a class with all its methods (`Model.*`), and who waits for it."""

    id: str
    app: App
    name: str
    definition: api_pb2.Function = field(default_factory=api_pb2.Function)
    gpus: list[api_pb2.GPUConfig] = field(default_factory=list)  # in order of preference
    params: bytes = b""  # of a class that has parameters
    waiting: deque[Input] = field(default_factory=deque)
    containers: list["Container"] = field(default_factory=list)  # all there ever were
    crashes: int = 0
    crashes_in_a_row: int = 0  # since a container last took an input and finished it

    @property
    def live(self) -> list["Container"]:
        """Containers whose process has not ended."""
        return [it for it in self.containers if it.exit_code is None]

    @property
    def slots(self) -> int:
        """Inputs one container holds at once."""
        return self.definition.max_concurrent_inputs or 1

    @property
    def schedule(self) -> str:
        """As a person would write it; empty for a function without."""
        schedule = self.definition.schedule
        if schedule.HasField("cron"):
            return f"cron {schedule.cron.cron_string} {schedule.cron.timezone}".strip()
        if schedule.HasField("period"):
            parts = (f"{value:g} {it.name}" for it, value in schedule.period.ListFields())
            return "every " + ", ".join(parts)
        return ""

    def handle(self) -> api_pb2.FunctionHandleMetadata:
        """What clients know about it."""
        definition = self.definition
        handle = self._handle(definition)
        handle.class_parameter_info.CopyFrom(definition.class_parameter_info)
        for name, method in definition.method_definitions.items():
            of_method = self._handle(method)
            of_method.is_method, of_method.use_method_name = True, name
            handle.method_handle_metadata[name].CopyFrom(of_method)
        return handle

    def _handle(self, of: api_pb2.Function | api_pb2.MethodDefinition) -> api_pb2.FunctionHandleMetadata:
        return api_pb2.FunctionHandleMetadata(
            app_id=self.app.id,
            definition_id=f"de-{self.id}",
            function_name=of.function_name,
            function_type=of.function_type,
            function_schema=of.function_schema,
            web_url=f"https://modal.invalid/{of.function_name}" if of.webhook_config.type else "",
            supported_input_formats=of.supported_input_formats,
            supported_output_formats=of.supported_output_formats,
            max_object_size_bytes=INLINE_BYTES,
            max_async_object_size_bytes=INLINE_BYTES,
        )


@dataclass
class Dict:
    """A `modal.Dict`: keys and values as the client serialised them."""

    id: str
    name: str
    entries: dict[bytes, bytes] = field(default_factory=dict)

    def contents(self) -> dict[Any, Any]:
        """As Python has them."""
        return {deserialize(key, None): deserialize(value, None) for key, value in self.entries.items()}
