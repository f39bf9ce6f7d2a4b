"""Checks a deployment that takes calls: one line a check."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from inference.build.engines import choose_engine
from inference.doctor import Finding, unread
from inference.errors import I2VError
from inference.fleet.shape import TRANSFERS_S
from inference.providers import is_paid
from inference.settings import Settings

MAX_DISPATCH_S = 1800.0
"""The longest dispatch deadline of Cloud Tasks."""


@dataclass(frozen=True, slots=True)
class Retries:
    """For how long, and how many at once, a caller delivers."""

    window_s: float | None  # None: without end
    at_once: int | None  # deliveries under way at the same time; None: not known
    source: str  # where this is known from


async def examine_push(load: Callable[[], Settings]) -> AsyncIterator[Finding]:
    """Settings, who may call, the table, and whether the caller's patience fits; cheapest first."""
    try:
        settings = load().model_copy(update={"queue": "video_jobs"})
        settings = choose_engine(settings)
    except I2VError as error:
        for line in str(error).splitlines():
            yield Finding("settings", "FAIL", line)
        return
    for finding in unread(settings):
        yield finding
    yield _callers(settings)
    yield await _table(settings)
    yield _deadline(settings)
    retries = None
    if settings.push_tasks_queue:
        finding, retries = await _tasks(settings)
        yield finding
    if retries is None and settings.push_retry_window_s is not None:
        retries = Retries(settings.push_retry_window_s, None, "I2V_PUSH_RETRY_WINDOW")
    yield _window(settings, retries)
    yield _concurrency(settings, retries)


def _callers(settings: Settings) -> Finding:
    try:
        from inference.push.opening import build_auth, callers_of  # noqa: PLC0415 - an extra

        build_auth(settings)
    except (I2VError, ImportError) as error:
        return Finding("callers", "FAIL", str(error))
    known = [f"the secret, in {settings.push_token_header} or as Bearer"] if settings.push_token else []
    if settings.push_audience:
        known.append(f"{', '.join(callers_of(settings))} with tokens for {settings.push_audience}")
    if settings.push_audience and settings.push_url and settings.push_audience != settings.push_url:
        return Finding(
            "callers",
            "FAIL",
            f"I2V_PUSH_AUDIENCE ({settings.push_audience}) is not I2V_PUSH_URL ({settings.push_url}): Cloud Tasks and "
            "Cloud Scheduler make tokens for the address that they call unless told otherwise",
        )
    return Finding("callers", "ok", "; ".join(known))


async def _table(settings: Settings) -> Finding:
    try:
        from inference.push.opening import open_jobs  # noqa: PLC0415 - an extra

        async with open_jobs(settings) as jobs:
            await jobs.check()
            waiting = await jobs.backlog()
    except (I2VError, ImportError) as error:
        return Finding("table", "FAIL", str(error))
    return Finding("table", "ok", f"the database answers and has every column; {waiting} jobs wait")


def job_limit_s(settings: Settings) -> float:
    """How long a job may take: the limit of its generation, and of what is moved before and after."""
    return settings.attempt_limit_s + TRANSFERS_S


def _deadline(settings: Settings) -> Finding:
    limit_s, deadline_s = job_limit_s(settings), settings.push_deadline_s
    if deadline_s > limit_s:
        return Finding(
            "deadline", "ok", f"callers wait {deadline_s:g} s, and a job of one clip takes at most {limit_s:g} s"
        )
    return Finding(
        "deadline",
        "FAIL",
        f"I2V_PUSH_DEADLINE ({deadline_s:g} s) is not longer than a job may take ({limit_s:g} s: I2V_ATTEMPT_LIMIT and "
        f"{TRANSFERS_S:g} s for its files). Such a job is answered 202 and goes on with no request open, which Cloud "
        f"Run pauses unless its CPU is always allocated: set I2V_ATTEMPT_LIMIT to {MAX_DISPATCH_S - TRANSFERS_S - 1:g} "
        f"or less, and I2V_PUSH_DEADLINE to {MAX_DISPATCH_S:g}",
    )


async def _tasks(settings: Settings) -> tuple[Finding, Retries | None]:
    try:
        from inference.push.opening import build_tasks  # noqa: PLC0415 - an extra

        tasks = build_tasks(settings)
        assert tasks is not None  # noqa: S101 - its setting is there
        queue = await tasks.settings()
    except ImportError as error:
        return Finding("tasks", "FAIL", str(error)), None
    except I2VError as error:
        return Finding("tasks", "skip", f"its settings cannot be read: {error}"), None
    config = queue.retry_config
    retries = Retries(
        window_s=retry_window_s(
            config.max_attempts,
            config.max_retry_duration.total_seconds(),
            config.min_backoff.total_seconds(),
            config.max_backoff.total_seconds(),
            config.max_doublings,
        ),
        at_once=queue.rate_limits.max_concurrent_dispatches or None,
        source=settings.push_tasks_queue or "",
    )
    return Finding("tasks", "ok", f"{settings.push_tasks_queue} answers"), retries


def retry_window_s(
    attempts: int, duration_s: float, min_backoff_s: float, max_backoff_s: float, doublings: int
) -> float | None:
    """Seconds from a task's first attempt to its last, as Cloud Tasks documents RetryConfig; None: it never ends.

    A task is given up once both limits are exceeded: `attempts` (-1: no limit) and `duration_s` (0: no limit of time
    beside the attempts). The pause begins at `min_backoff_s`, doubles `doublings` times, then grows by what it is then
    each time, up to `max_backoff_s`. How long an attempt itself takes is not counted.
    """
    if attempts < 0:
        return None
    total_s, pause_s, step_s = 0.0, min_backoff_s, min_backoff_s * 2.0**doublings
    for number in range(attempts - 1):
        total_s += min(pause_s, max_backoff_s)
        pause_s += pause_s if number < doublings else step_s
    return max(total_s, duration_s)


def _window(settings: Settings, retries: Retries | None) -> Finding:
    stale_s = settings.jobs_stale_s
    if retries is None:
        return Finding(
            "retries",
            "skip",
            f"not known for how long the caller delivers again: it should be longer than {stale_s:g} s "
            "(I2V_JOBS_STALE), after which a dead holder's job is free; set I2V_PUSH_RETRY_WINDOW, or trust the sweep",
        )
    if retries.window_s is None or retries.window_s > stale_s:
        told = "without end" if retries.window_s is None else f"for {retries.window_s:g} s"
        return Finding(
            "retries",
            "ok",
            f"delivered again {told}, a dead holder's job is free after {stale_s:g} s ({retries.source})",
        )
    return Finding(
        "retries",
        "FAIL",
        f"delivered again for {retries.window_s:g} s only ({retries.source}), but a dead holder's job is free after "
        f"{stale_s:g} s: raise max_attempts and max_retry_duration, or leave all such jobs to the sweep",
    )


def _concurrency(settings: Settings, retries: Retries | None) -> Finding:
    at_once = settings.push_at_once
    if at_once > 1 and not is_paid(settings.engine):
        return Finding(
            "concurrency",
            "FAIL",
            f"I2V_PUSH_AT_ONCE is {at_once}, but {settings.engine} makes one video at a time: further jobs would be "
            "held and wait, while another instance could run them; set it to 1",
        )
    asked = f"; the queue delivers up to {retries.at_once} at once" if retries and retries.at_once else ""
    return Finding(
        "concurrency",
        "ok",
        f"{at_once} at once in each instance, others are answered 503{asked}: set the concurrency of a Cloud Run "
        f"service to {at_once}, and the queue's max_concurrent_dispatches to that of all instances together",
    )
