"""A RunPod serverless endpoint as its callers see it: sends, follows and cancels jobs, and reads the endpoint's health.

From docs.runpod.io, RunPod's own Python client 1.12, and experiments against a loopback server. Missing counts are read
as zero, and unknown fields and statuses are ignored, because RunPod adds some now and then.
"""

import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Any, TypeVar

import anyio
import httpx
import structlog
import tenacity
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from inference.errors import AccountError, EngineError, EngineFailed, InvalidRequest, JobInDoubt, one_line
from inference.progress.stages import Progress, Sink
from inference.transfer import json_api
from inference.transfer.json_api import MAX_SAID_CHARS, JsonApi, Unanswered

T = TypeVar("T")
log = structlog.get_logger(__name__)

IDLE_TIMEOUT_S = 30.0
"""A connection on which nothing moves for this long is dead."""

ANSWER_LIMIT_S = 120.0
"""For one request, whole. Some carry a photo out or a video back."""

TRIES, MAX_PAUSE_S = 4, 8.0
"""Attempts of a request that may be repeated, and the longest pause between them."""

MAX_ANSWER_BYTES = 32_000_000
"""RunPod takes answers of 20 MB at the most, and one that holds a video comes close to that."""

POLL_S = 1.0
"""Between two status requests for a job; RunPod allows 2,000 in ten seconds."""

PATIENCE_S = 300.0
"""How long status requests may stay unanswered. RunPod keeps a result for thirty minutes."""

MAX_UNKNOWN = 5
"""How often in a row RunPod may not know a job: one sent a moment ago may not have reached all its servers."""

QUIET_S = 20.0
"""How long a job waits before its caller is told why, and how often that is updated."""

MIN_EXECUTION_S, MIN_TTL_S, MAX_POLICY_S = 6.0, 10.0, 7 * 86_400.0
"""Limits that RunPod accepts for a job: execution for more than 5 s, a ttl from 10 s on, and a week at most."""

JobId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._~-]{1,200}$")]  # part of a URL's path
Count = Annotated[int, Field(ge=0), BeforeValidator(lambda value: value or 0)]  # null where RunPod has no count
OrNothing = BeforeValidator(lambda value: value or {})


class _Told(BaseModel):
    """A part of an answer, with RunPod's own field names."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, serialize_by_alias=True)


class RunPodJob(_Told):
    """One job. An unknown status counts as work in progress."""

    id: JobId
    status: str
    output: Any = None  # the worker's output; while it works, the last progress it sent
    error: Any = None
    delay_ms: Annotated[float | None, Field(alias="delayTime")] = None  # time spent in the queue
    execution_ms: Annotated[float | None, Field(alias="executionTime")] = None  # time spent on a worker

    @property
    def has_ended(self) -> bool:
        """Whether its status is final."""
        return self.status in ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")

    @property
    def is_waiting(self) -> bool:
        """Whether no worker has taken it yet."""
        return self.status == "IN_QUEUE"

    @property
    def progress(self) -> Progress | None:
        """The last progress that its worker reported, if any."""
        if self.has_ended or not isinstance(self.output, dict):
            return None
        ours = {name: value for name, value in self.output.items() if name in Progress.model_fields}
        try:
            return Progress.model_validate(ours)
        except ValidationError:
            return None

    @property
    def why(self) -> str:
        """Why it failed, in one line; for an uncaught exception of the worker, its message."""
        said = self.error
        with suppress(ValueError, TypeError, RecursionError):
            told = json.loads(said)
            said = told["error_message"] or told["error_type"] if isinstance(told, dict) else said
        return one_line(str(said or ""), MAX_SAID_CHARS) or "RunPod does not say why"


class JobCounts(_Told):
    """How many jobs of an endpoint are in which state."""

    in_progress: Annotated[Count, Field(alias="inProgress")] = 0
    in_queue: Annotated[Count, Field(alias="inQueue")] = 0
    completed: Count = 0
    failed: Count = 0
    retried: Count = 0


class WorkerCounts(_Told):
    """How many workers of an endpoint are in which state."""

    running: Count = 0
    idle: Count = 0
    ready: Count = 0
    initializing: Count = 0  # fetching the image or starting the handler
    throttled: Count = 0  # wanted, but no machine is free
    unhealthy: Count = 0


class Health(_Told):
    """An endpoint at one moment."""

    jobs: Annotated[JobCounts, OrNothing] = JobCounts()
    workers: Annotated[WorkerCounts, OrNothing] = WorkerCounts()

    @property
    def wait(self) -> str:
        """What a job in the queue waits for."""
        workers = self.workers
        if workers.running + workers.idle + workers.ready:
            return f"in queue with {max(self.jobs.in_queue - 1, 0)} more, {workers.running} workers are busy"
        counts = {state: getattr(workers, state) for state in ("initializing", "throttled", "unhealthy")}
        if not any(counts.values()):
            return "in queue, the endpoint has no workers: is its max workers above 0?"
        return f"in queue, no worker is ready: {', '.join(f'{count} {state}' for state, count in counts.items())}"


class _RunPodAnswer(json_api.ApiAnswer):
    """An answer of RunPod, or of a proxy in front of it."""

    @staticmethod
    def told(payload: dict[str, Any]) -> str:
        """Why a request was refused, from any of the fields that RunPod's gateways use for it."""
        return next((str(payload[name]) for name in ("error", "detail", "message", "title") if payload.get(name)), "")

    @property
    def may_pass(self) -> bool:
        """Whether the same request may succeed in a moment."""
        return self.status in (408, 429) or self.status >= 500

    def error(self, endpoint_id: str) -> EngineError:
        """The error that an unsuccessful answer stands for."""
        said = f"RunPod: {self.status} {self.said}".strip()
        match self.status:
            case 401 | 403:
                return AccountError(
                    f"{said}: it does not accept the key; set RUNPOD_API_KEY to one of console.runpod.io"
                )
            case 402:
                return AccountError(f"{said}: the account at console.runpod.io needs funds")
            case 404 | 405:
                return AccountError(
                    f"{said}: this key has no endpoint {endpoint_id}; set RUNPOD_ENDPOINT_ID to the id of one "
                    "with a queue, at console.runpod.io/serverless"
                )
            case 413:
                return InvalidRequest(f"{said}: the request is larger than RunPod takes")
            case status if status < 400:
                return AccountError(f"{said}: no RunPod API answers at this address, see RUNPOD_ENDPOINT_BASE_URL")
        return EngineFailed(said) if self.may_pass else InvalidRequest(said)


class RunPodApi(JsonApi[_RunPodAnswer]):
    """One endpoint, for the length of a block.

    Idempotent requests are repeated a few times; a job is sent once.

    Raises, from every method but `ask`: AccountError where the key or the endpoint is wrong, EngineFailed where RunPod
    does not answer or limits our rate, InvalidRequest.
    """

    def __init__(
        self, key: str, base_url: str, endpoint_id: str, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        url = f"{base_url.rstrip('/')}/{endpoint_id}/"
        super().__init__(
            _RunPodAnswer,
            url,
            key,
            limit_s=ANSWER_LIMIT_S,
            idle_s=IDLE_TIMEOUT_S,
            max_answer_bytes=MAX_ANSWER_BYTES,
            transport=transport,
        )
        self._endpoint_id = endpoint_id

    async def run(
        self, payload: dict[str, Any], *, execution_timeout_s: float, ttl_s: float, webhook: str | None = None
    ) -> str:
        """Sends a job and returns its id.

        `execution_timeout_s`: after this time RunPod ends a worker that still runs the job. `ttl_s`: after this time,
        counted from now, RunPod forgets the job, whether waiting, running or done (github.com/runpod/docs/pull/525,
        which corrects "maximum queue time"). So it has to cover the wait and the work together.

        Also raises JobInDoubt where the answer was lost: a GPU may be working on the job, and sending it again could
        start a second one. A request that certainly was not carried out is repeated.
        """
        policy = {
            "executionTimeout": _milliseconds(execution_timeout_s, MIN_EXECUTION_S),
            "ttl": _milliseconds(ttl_s, MIN_TTL_S),
        }
        body = {"input": payload, "policy": policy} | ({"webhook": webhook} if webhook else {})

        async def send() -> str:
            try:
                answer = await self.ask("POST", "run", body)
            except Unanswered as error:
                why = f"no answer of {error}"
                raise (_in_doubt(why) if error.sent else EngineFailed(f"RunPod: {why}")) from None
            if answer.may_pass and answer.status != 429:  # it failed after it may have passed the job on
                raise _in_doubt(f"{answer.status} {answer.said}")
            if not 200 <= answer.status < 300:
                raise answer.error(self._endpoint_id)
            try:
                return RunPodJob.model_validate(answer.payload).id
            except ValidationError:
                raise _in_doubt("its answer has no job in it") from None

        return await _repeated(send)

    async def status(self, job_id: str) -> RunPodJob | None:
        """The state of a job; None where RunPod does not know it, yet or any more."""
        return await self._job("GET", f"status/{job_id}")

    async def cancel(self, job_id: str) -> RunPodJob | None:
        """Takes a job out of the queue, or stops its worker; None where RunPod does not know it."""
        return await self._job("POST", f"cancel/{job_id}")

    async def health(self) -> Health:
        """The endpoint's jobs and workers, counted by state."""
        answer = await self._asked("GET", "health")
        if not 200 <= answer.status < 300:
            raise answer.error(self._endpoint_id)
        try:
            return Health.model_validate(answer.payload)
        except ValidationError:
            raise EngineFailed("RunPod: its answer to /health is not what its documents say") from None

    async def until_ended(self, job_id: str, sink: Sink, *, wait_s: float) -> RunPodJob:
        """Follows a job to its end and passes its progress to `sink`. Tolerates RunPod not answering for a while.

        Also raises EngineFailed where no worker took the job within `wait_s`, and where RunPod no longer knows it; the
        job is not cancelled then.
        """
        watch = _Watch(self, sink, wait_s)
        while True:
            job = await watch.look(job_id)
            if job is not None and job.has_ended:
                return job
            await anyio.sleep(POLL_S)

    async def _job(self, method: str, path: str) -> RunPodJob | None:
        answer = await self._asked(method, path)
        if answer.status == 404:
            return None
        if not 200 <= answer.status < 300:
            raise answer.error(self._endpoint_id)
        try:
            return RunPodJob.model_validate(answer.payload)
        except ValidationError:
            raise EngineFailed("RunPod: its answer about a job is not what its documents say") from None

    async def _asked(self, method: str, path: str) -> _RunPodAnswer:
        """An idempotent request, repeated where that may help; refusals are returned as answers."""

        async def ask() -> _RunPodAnswer:
            try:
                answer = await self.ask(method, path)
            except Unanswered as error:
                raise EngineFailed(f"RunPod: no answer of {error}") from None
            if answer.may_pass:
                raise answer.error(self._endpoint_id)
            return answer

        return await _repeated(ask)


class _Watch:
    """Polls one job and tells its caller about it."""

    def __init__(self, api: RunPodApi, sink: Sink, wait_s: float) -> None:
        self._api, self._sink, self._wait_s = api, sink, wait_s
        self._heard_at = self._queued_at = self._news_at = anyio.current_time()
        self._unknown = 0
        self._fraction = 0.0
        self._wait = "in queue"

    async def look(self, job_id: str) -> RunPodJob | None:
        """One status request; None where no answer came. Raises as RunPodApi.until_ended."""
        try:
            job = await self._api.status(job_id)
        except EngineFailed as error:
            if anyio.current_time() - self._heard_at > PATIENCE_S:
                raise
            log.warning("look_lost", job_id=job_id, error=str(error))
            self._sink(Progress(stage="RunPod does not answer", done=0, total=1, fraction=self._fraction))
            return None
        self._heard_at = anyio.current_time()
        self._unknown = 0 if job else self._unknown + 1
        if self._unknown > MAX_UNKNOWN:
            raise EngineFailed(
                f"RunPod did not find job {job_id} in {self._unknown} looks: unless that passes, it is forgotten, and "
                "its answer with it"
            )
        if job is not None and job.is_waiting:
            await self._tell_wait(job_id)
        elif job is not None and not job.has_ended:
            # RunPod may put a job back into its queue, where it waits anew.
            self._queued_at = self._news_at = self._heard_at
            self._wait = "in queue"
            self._tell_work(job.progress)
        return job

    async def _tell_wait(self, job_id: str) -> None:
        now = anyio.current_time()
        if now - self._news_at > QUIET_S:
            self._news_at = now
            with suppress(EngineFailed):
                self._wait = (await self._api.health()).wait
        if now - self._queued_at > self._wait_s:
            raise EngineFailed(
                f"no worker took job {job_id} within the {self._wait_s / 60:g} minutes of --wait ({self._wait}); "
                "`i2v runpod health` shows the workers"
            )
        self._sink(Progress(stage=self._wait, done=0, total=1, fraction=self._fraction))

    def _tell_work(self, progress: Progress | None) -> None:
        progress = progress or Progress(stage="running", done=0, total=1, fraction=self._fraction)
        if progress.fraction >= self._fraction:  # progress posts of a worker can overtake each other
            self._fraction = progress.fraction
            self._sink(progress)


async def _repeated(operation: Callable[[], Awaitable[T]]) -> T:
    """Retries retryable errors, with full jitter."""
    tries = tenacity.AsyncRetrying(
        sleep=anyio.sleep,
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, EngineError) and error.retryable),
        stop=tenacity.stop_after_attempt(TRIES),
        wait=tenacity.wait_random_exponential(multiplier=1, max=MAX_PAUSE_S),
        reraise=True,
    )
    return await tries(operation)


def _in_doubt(why: str) -> JobInDoubt:
    return JobInDoubt(f"whether the job was taken is not known ({why})")


def _milliseconds(seconds: float, least_s: float) -> int:
    return int(1000 * min(max(seconds, least_s), MAX_POLICY_S))
