"""A job is a row, and a task of Cloud Tasks that asks for it.

The row is written first: a crash between the two leaves a row that waits, which the sweep finds and makes a task for.
The other way round a task could arrive before its row, be answered 404, and use up its tries. A task whose row is gone
is answered 404 until its tries are used up, and leaves nothing behind.
"""

import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio.to_thread
import structlog
from google.api_core import exceptions
from google.api_core.retry import Retry, if_exception_type
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
from google.cloud import tasks_v2
from google.protobuf import duration_pb2

from inference.errors import I2VError, QueueAuthError, QueueRefused, QueueUnavailable, SettingsError, one_line
from inference.push.app import DEADLINE_HEADER

log = structlog.get_logger(__name__)

CALL_S = 20.0
"""How long one call may take, with the client's own retries."""

AGAIN_S = 600
"""A job that the sweep asks for again gets one more task in each such span of time at most. Its first name cannot be
taken: Cloud Tasks refuses the name of a task that ended for an hour and longer, as if the task were there."""

DIGEST_CHARS = 16
"""Hexadecimal: 64 bits. A name has room for 500 characters, a job's id for 200."""

MAX_REASON_CHARS = 300


class Tasks:
    """One queue of Cloud Tasks, whose tasks ask `/jobs/run` for one job each."""

    def __init__(
        self,
        client: tasks_v2.CloudTasksClient,
        queue: str,
        url: str,
        *,
        deadline_s: float,
        secret: str | None = None,
        service_account: str | None = None,
        audience: str | None = None,
        call_s: float = CALL_S,
    ) -> None:
        """`queue`: projects/P/locations/L/queues/Q. `url`: of `/jobs/run`.

        Tasks bring an OIDC token of `service_account` for `audience`, or else the `secret`. Raises SettingsError
        without either.
        """
        if not (service_account and audience) and not secret:
            raise SettingsError(
                "tasks could bring no token: set I2V_PUSH_SERVICE_ACCOUNT and I2V_PUSH_AUDIENCE, or I2V_PUSH_TOKEN"
            )
        self._client, self._queue, self._url, self._deadline_s = client, queue, url, deadline_s
        # A call that is repeated does no harm: tasks have names.
        self._retry = Retry(predicate=if_exception_type(exceptions.ServiceUnavailable), maximum=2.0, timeout=call_s)
        self._call_s = call_s
        self._secret, self._service_account, self._audience = secret, service_account, audience

    async def ask(self, job_id: str, extras: dict[str, Any] | None = None, *, again: bool = False) -> bool:
        """Makes the task `video-{job_id}`; False where it was there already, which is as good.

        `again`: the first task may have been given up, so the name gets a suffix that changes every AGAIN_S.
        Raises QueueUnavailable, QueueAuthError, QueueRefused, SettingsError.
        """
        name = f"{self._queue}/tasks/video-{task_id(job_id)}" + (f"-{int(time.time() // AGAIN_S)}" if again else "")
        request = tasks_v2.HttpRequest(
            http_method=tasks_v2.HttpMethod.POST,
            url=self._url,
            headers={"Content-Type": "application/json", DEADLINE_HEADER: f"{self._deadline_s:g}"},
            body=json.dumps({**(extras or {}), "job_id": job_id}).encode(),
        )
        if self._service_account and self._audience:
            request.oidc_token = tasks_v2.OidcToken(
                service_account_email=self._service_account, audience=self._audience
            )
        else:
            request.headers["Authorization"] = f"Bearer {self._secret}"
        task = tasks_v2.Task(
            name=name,
            http_request=request,
            dispatch_deadline=duration_pb2.Duration(seconds=int(self._deadline_s)),
        )
        try:
            await self._call(lambda: self._client.create_task(parent=self._queue, task=task, **self._patience))
        except _Exists:
            log.info("task_exists", item_id=job_id, task=name.rpartition("/")[2])
            return False
        log.info("task_made", item_id=job_id, task=name.rpartition("/")[2])
        return True

    async def ask_again(self, job_id: str) -> None:
        """See Ask."""
        await self.ask(job_id, again=True)

    async def settings(self) -> tasks_v2.Queue:
        """How the queue is set up. Raises as `ask`."""
        found: tasks_v2.Queue = await self._call(lambda: self._client.get_queue(name=self._queue, **self._patience))
        return found

    @property
    def _patience(self) -> dict[str, Any]:
        return {"retry": self._retry, "timeout": self._call_s}

    async def _call(self, call: Callable[[], Any]) -> Any:
        try:
            return await anyio.to_thread.run_sync(call)
        except exceptions.AlreadyExists:
            raise _Exists from None
        except (exceptions.Unauthenticated, exceptions.PermissionDenied) as error:
            raise QueueAuthError(f"Cloud Tasks: {_reason(error)}") from None
        except exceptions.NotFound:
            raise SettingsError(f"I2V_PUSH_TASKS_QUEUE: there is no queue {self._queue}") from None
        except (exceptions.InvalidArgument, exceptions.FailedPrecondition) as error:
            raise QueueRefused(f"Cloud Tasks: {_reason(error)}") from None
        except (exceptions.GoogleAPIError, GoogleAuthError) as error:
            raise QueueUnavailable(f"Cloud Tasks: {_reason(error)}") from None


class _Exists(Exception):
    """A task of that name is there, or was not long ago."""


def task_id(job_id: str) -> str:
    """A job's id as part of a task's name, which takes letters, digits, - and _ only: as it is, where it can be.

    So whoever makes the task of such a job, it has one name. An id with . or : gets a digest, to stay distinct.
    """
    if not {".", ":"} & set(job_id):
        return job_id
    digest = hashlib.sha256(job_id.encode()).hexdigest()[:DIGEST_CHARS]
    return f"{job_id.replace('.', '-').replace(':', '-')}-{digest}"


def open_client(emulator: str | None = None) -> tasks_v2.CloudTasksClient:
    """The client for Google's service, or for an emulator at host:port. Raises SettingsError without credentials."""
    if emulator:
        import grpc  # noqa: PLC0415 - only an emulator needs a channel of our own
        from google.cloud.tasks_v2.services.cloud_tasks.transports import (  # noqa: PLC0415
            CloudTasksGrpcTransport,
        )

        return tasks_v2.CloudTasksClient(transport=CloudTasksGrpcTransport(channel=grpc.insecure_channel(emulator)))
    try:
        return tasks_v2.CloudTasksClient()
    except DefaultCredentialsError as error:
        raise SettingsError(
            f"no credentials of Google are here (gcloud auth application-default login): {_reason(error)}"
        ) from None


async def enqueue(
    insert: Callable[[], Awaitable[str]], tasks: Tasks | None, extras: dict[str, Any] | None = None
) -> str:
    """A row, then its task; returns the job's id. `insert` writes the row, the same one when it is called again.

    Without `tasks`, or where the task cannot be made now, the row waits for the sweep. Raises as `insert` does.
    """
    job_id = await insert()
    if tasks is not None:
        try:
            await tasks.ask(job_id, extras)
        except SettingsError:
            raise
        except I2VError as error:  # the row is there, so the job is accepted
            log.warning("task_not_made", item_id=job_id, error=str(error))
    return job_id


def _reason(error: Exception) -> str:
    return one_line(str(error) or type(error).__name__, MAX_REASON_CHARS)
