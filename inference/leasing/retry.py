"""The retry policy: how often each kind of error is retried, and with which pauses."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import anyio
import structlog
import tenacity

from inference.errors import I2VError, QueueFailed, QueueUnavailable

T = TypeVar("T")
log = structlog.get_logger(__name__)

PATIENCE_ATTEMPTS = 40
"""How often one call is repeated while the queue does not answer it: about nine minutes. In a real outage the lease
would have ended by then, so a call that still fails while heartbeats are answered fails because of this task.

Reports are repeated as often where the queue answers 5xx: the work is done by then, and the task's next holder would
have to pay for all of it again."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How a lease is kept and how often calls are attempted."""

    heartbeat_interval_s: float = 120  # Life-is-Short documents
    second_beat_s: float = 4  # the real server may lease a task twice; the second beat shows who has it
    beat_timeout_s: float = 15
    beat_retry_s: float = 10
    attempt_limit_s: float = 1800  # a generation that takes longer counts as hung
    attempts: int = 3  # per stage; Life-is-Short documents
    patience_attempts: int = PATIENCE_ATTEMPTS
    patience_pauses_s: tuple[float, float] | None = None  # the first pause, which doubles up to the second; or random
    retry_wait_s: float = 5  # between attempts; Life-is-Short documents
    keep_temp: bool = False  # keep the folder of each lease for inspection


async def repeat(
    operation: Callable[[], Awaitable[T]],
    policy: Policy,
    check: Callable[[], None] | None = None,
    *,
    answers_count: bool = False,
) -> T:
    """Runs `operation` with retries: many while the queue does not answer, a few for all other retryable errors.

    With `answers_count`, a 5xx of the queue itself is one of the other errors. `check` is called before each attempt
    and may raise to end the retries.
    """

    def is_away(error: BaseException) -> bool:
        return isinstance(error, QueueUnavailable) and not (answers_count and isinstance(error, QueueFailed))

    def may_pass(error: BaseException) -> bool:
        return isinstance(error, I2VError) and error.retryable and not is_away(error)

    patiently = tenacity.AsyncRetrying(
        sleep=anyio.sleep,
        retry=tenacity.retry_if_exception(is_away),
        stop=tenacity.stop_after_attempt(policy.patience_attempts),
        wait=_pauses(policy),
        before_sleep=_tell,
        reraise=True,
    )
    a_few_times = tenacity.AsyncRetrying(
        sleep=anyio.sleep,
        retry=tenacity.retry_if_exception(may_pass),
        stop=tenacity.stop_after_attempt(policy.attempts),
        wait=tenacity.wait_fixed(policy.retry_wait_s) + tenacity.wait_random(0, 1),
        before_sleep=_tell,
        reraise=True,
    )

    async def once() -> T:
        if check:
            check()  # fence
        return await operation()

    async def while_unanswered() -> T:
        return await patiently(once)

    return await a_few_times(while_unanswered)


def _pauses(policy: Policy) -> tenacity.wait.wait_base:
    if policy.patience_pauses_s is None:
        return tenacity.wait_random_exponential(multiplier=1, max=30)
    first_s, longest_s = policy.patience_pauses_s
    return tenacity.wait_exponential(multiplier=first_s, max=longest_s)


def _tell(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("trying_again", attempt=state.attempt_number, error=str(error))
