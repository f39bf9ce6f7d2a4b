"""The shapes of the Life-is-Short worker API, and the one place where they are validated."""

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from inference.errors import InvalidTask, QueueAuthError, QueueFailed, QueueRefused, QueueUnavailable, SettingsError
from inference.queues.item import duration_s
from inference.task import MAX_DURATION_S, QUEUE_FPS, Identifier, Task, explain
from inference.transfer.network import safe_for_a_key

M = TypeVar("M", bound=BaseModel)

BYPASS_HEADER = "x-vercel-protection-bypass"
BYPASS_SETTING = "VERCEL_AUTOMATION_BYPASS_SECRET"
"""vercel.com/docs/deployment-protection/methods-to-bypass-deployment-protection/protection-bypass-automation"""

PROTECTION_MARK = b"_vercel_sso_nonce"
"""In the page that Vercel's Deployment Protection answers with, 401 to every call (seen before the real app)."""

identifier: TypeAdapter[str] = TypeAdapter(Identifier)


def _relative(path: str) -> str:
    """A path that stays where the storage keeps it."""
    if not path or path.startswith("/") or ".." in path.split("/") or "\\" in path or not path.isprintable():
        raise ValueError("must be a relative path without `..`, backslashes or control characters")
    return path


StoragePath = Annotated[str, Field(max_length=1024), AfterValidator(_relative)]


class _WireTask(BaseModel):
    """`data` of a next-task answer; JSON types are taken as they are, never converted.

    What no video depends on may be missing: the real server has rows without a group, and prompts of any length.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    item_id: Identifier
    group_id: str | None = None
    photo_id: str | None = None
    prompt: str | None = None
    photo_storage_path: StoragePath
    frame_num: Annotated[int, Field(ge=2, le=int(MAX_DURATION_S * QUEUE_FPS) + 1)] | None = None  # 24 x seconds + 1
    inference_provider: str | None = None
    leased_until: object = None  # the server's clock: never compared, so not kept


def parse_task(payload: object) -> Task:
    """The task in a next-task answer. Unknown fields go to `extras` as they are.

    Raises InvalidTask naming every wrong field, with the item_id where the payload has a usable one.
    """
    try:
        wire = _WireTask.model_validate(payload)
    except ValidationError as error:
        item_id = payload.get("item_id") if isinstance(payload, Mapping) else None
        try:
            usable = identifier.validate_python(item_id, strict=True)
        except ValidationError:
            usable = None
        raise InvalidTask(f"malformed task: {explain(error)}", item_id=usable) from None
    return Task(
        item_id=wire.item_id,
        group_id=wire.group_id,
        photo_id=wire.photo_id,
        prompt=wire.prompt or "",
        photo_storage_path=wire.photo_storage_path,
        duration_s=duration_s(wire.frame_num),
        names_duration=wire.frame_num is not None,
        provider=wire.inference_provider,
        extras=wire.model_extra or {},
    )


class Backlog(BaseModel):
    """`data` of a backlog answer."""

    waiting: Annotated[int, Field(strict=True, ge=0)]


class SignedDownload(BaseModel):
    """`data` of a presign answer; when the URL expires only its own server knows."""

    url: Annotated[str, Field(min_length=1)]


class SignedUpload(SignedDownload):
    """The same for an upload, with the path the server chose: the one to report."""

    storage_path: StoragePath


class Answer(NamedTuple):
    """One answer of the API, or of whatever stands in its place."""

    call: str
    status: int
    is_json: bool
    success: bool | None  # None: not the API's envelope, so it was not the API that answered
    payload: Any
    error: str
    is_protected: bool = False  # Vercel's Deployment Protection answered instead of the app

    def refused_with(self, *statuses: int) -> bool:
        """Whether the API itself, not a proxy in front of it, refused with one of these."""
        return self.success is False and self.status in statuses

    @property
    def has_failed(self) -> bool:
        """Whether the API itself, not a gateway in front of it, says that it could not do it."""
        return self.success is False and self.status >= 500

    def data(self) -> Any:
        """What was asked for. Raises QueueAuthError, QueueFailed, QueueUnavailable, QueueRefused."""
        said = f"{self.call}: {self.status} {self.error}".rstrip()
        if self.is_protected:
            raise QueueAuthError(
                f"{said}: Vercel's Deployment Protection lets nobody through to the queue; "
                f"set {BYPASS_SETTING} to the project's bypass secret, or turn the protection off"
            )
        if self.status == 401:
            raise QueueAuthError(f"{said}: the queue does not accept the key; set WORKER_API_KEY to the server's")
        if self.has_failed:
            raise QueueFailed(said)
        if self.status == 429 or self.status >= 500:
            raise QueueUnavailable(said)
        if 300 <= self.status < 400:
            raise QueueRefused(f"{said}: the address of the queue is wrong; set VERCEL_API_URL to where it leads")
        if self.success and self.status < 300:
            return self.payload
        if self.success is None and (self.status >= 400 or not self.is_json):
            raise QueueUnavailable(f"{said}: something other than the worker API answered")
        if self.success is None:
            raise QueueRefused(f"{said}: not an answer of the worker API")
        raise QueueRefused(said)

    def data_as(self, model: type[M]) -> M:
        """What was asked for, in its shape. Raises as `data`, and QueueRefused for another shape."""
        try:
            return model.model_validate(self.data())
        except ValidationError as error:
            raise QueueRefused(f"{self.call}: not an answer of the worker API: {explain(error)}") from None


def worker_api_url(api_url: str) -> str:
    """`https://host/api/worker/` of `https://host`, with or without a trailing slash or `/api`.

    Raises SettingsError: the key must not travel in the clear, save to this machine.
    """
    try:
        url = safe_for_a_key(api_url)
    except SettingsError as error:
        raise SettingsError(f"VERCEL_API_URL: {error}") from None
    path = url.path.rstrip("/").removesuffix("/api")
    return str(url.copy_with(path=f"{path}/api/worker/"))
