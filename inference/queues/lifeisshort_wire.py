"""Messages of the Life-is-Short worker API, validated in this one place."""

from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, Field, ValidationError

from inference.errors import QueueAuthError, QueueFailed, QueueRefused, QueueUnavailable
from inference.task import StoragePath, explain

M = TypeVar("M", bound=BaseModel)

BYPASS_HEADER = "x-vercel-protection-bypass"
BYPASS_SETTING = "VERCEL_AUTOMATION_BYPASS_SECRET"
"""vercel.com/docs/deployment-protection/methods-to-bypass-deployment-protection/protection-bypass-automation"""

PROTECTION_MARK = b"_vercel_sso_nonce"
"""Found in the 401 page that Vercel's Deployment Protection answers every call with, in front of the real app."""


class Backlog(BaseModel):
    """`data` of a backlog answer."""

    waiting: Annotated[int, Field(strict=True, ge=0)]


class SignedDownload(BaseModel):
    """`data` of a presign answer. It does not say when the URL expires."""

    url: Annotated[str, Field(min_length=1)]


class SignedUpload(SignedDownload):
    """The same for an upload, with the path that the server chose, which has to be reported."""

    storage_path: StoragePath


class QueueAnswer(NamedTuple):
    """One answer of the API, or of a proxy or gateway in front of it."""

    call: str
    status: int
    is_json: bool
    success: bool | None  # None: the body is not the API's envelope, so something else answered
    payload: Any
    error: str
    is_protected: bool = False  # Vercel's Deployment Protection answered instead of the app

    def refused_with(self, *statuses: int) -> bool:
        """Whether the API itself, and not a proxy in front of it, refused with one of these statuses."""
        return self.success is False and self.status in statuses

    @property
    def has_failed(self) -> bool:
        """Whether the API itself, and not a gateway in front of it, answered 5xx."""
        return self.success is False and self.status >= 500

    def data(self) -> Any:
        """`data` of a successful answer. Raises QueueAuthError, QueueFailed, QueueUnavailable, QueueRefused."""
        said = f"{self.call}: {self.status} {self.error}".rstrip()
        if self.is_protected:
            raise QueueAuthError(
                f"{said}: Vercel's Deployment Protection lets nobody through to the queue; "
                f"set {BYPASS_SETTING} to the project's bypass secret, or turn the protection off"
            )
        if self.status == 401:
            raise QueueAuthError(f"the queue does not accept the key; set WORKER_API_KEY to the server's ({said})")
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
        """`data` of a successful answer, validated. Raises as `data`, and QueueRefused where it does not fit."""
        try:
            return model.model_validate(self.data())
        except ValidationError as error:
            raise QueueRefused(f"{self.call}: not an answer of the worker API: {explain(error)}") from None
