"""Trying again, by cause: how often, how far apart, and what is never tried twice."""

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
"""How often one call is put to a queue that does not answer it, about nine minutes. If the queue were really away
the lease would have ended by then: a call that still fails beside answered heartbeats fails for this task.

Reports get as many where the queue does answer, and says 5xx. Everything is done by then and only the word is missing;
whoever is given the task next would spend all of it again."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How a lease is kept and how often things are tried. Seconds."""

    heartbeat_interval_s: float = 120  # Life-is-Short documents
    second_beat_s: float = 4  # an overtaking update of the real server can land after the first beat
    beat_timeout_s: float = 15
    beat_retry_s: float = 10
    attempt_limit_s: float = 1800  # a generation that takes longer is hung
    attempts: int = 3  # per stage; Life-is-Short documents
    retry_wait_s: float = 5  # between them; Life-is-Short documents
    keep_temp: bool = False  # leave the folder of each lease for a look


async def repeat(
    operation: Callable[[], Awaitable[T]],
    policy: Policy,
    check: Callable[[], None] | None = None,
    *,
    answers_count: bool = False,
) -> T:
    """Tries again by cause: a queue that does not answer patiently, everything else that may pass a few times.

    With `answers_count` a queue that answers 5xx is among everything else. `check` stands before each try, so every
    boundary of a lease and every repetition is one.
    """

    def is_away(error: BaseException) -> bool:
        return isinstance(error, QueueUnavailable) and not (answers_count and isinstance(error, QueueFailed))

    def may_pass(error: BaseException) -> bool:
        return isinstance(error, I2VError) and error.retryable and not is_away(error)

    patiently = tenacity.AsyncRetrying(
        sleep=anyio.sleep,
        retry=tenacity.retry_if_exception(is_away),
        stop=tenacity.stop_after_attempt(PATIENCE_ATTEMPTS),
        wait=tenacity.wait_random_exponential(multiplier=1, max=30),
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


def _tell(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("trying_again", attempt=state.attempt_number, error=str(error))
