"""RunPod: one worker of a serverless endpoint. Wiring only; jobs are handled in `inference/`.

    on RunPod      the image of images/runpod.Dockerfile runs `python -u runpod_handler.py`
    on a laptop    python runpod_handler.py --rp_serve_api    python runpod_handler.py --test_input '{"input": {…}}'

README.md has the jobs it takes and how to call it.
"""

import asyncio
import functools
import signal
import sys
from types import FrameType
from typing import Any

import aiohttp
import aiohttp_retry
import runpod
from runpod.http_client import AsyncClientSession
from runpod.serverless.modules import rp_http, worker_state
from runpod.serverless.modules.rp_logger import RunPodLogger

from inference import logs
from inference.on_runpod.worker import RunPodWorker
from inference.process import told_errors
from inference.settings import Settings


@functools.cache
def settings() -> Settings:
    return Settings.load()


@functools.cache
def worker() -> RunPodWorker:
    return RunPodWorker(settings())


def weights_and_gpu() -> None:
    """Loads the engine. A worker where this check fails tells RunPod that it is unhealthy and why, and takes no job."""
    logs.configure(settings().log_level)
    settings().warn_of_unread()
    worker().load()


async def handle(job: dict[str, Any]) -> dict[str, Any]:
    """One job; what it may hold and what it is answered stands in inference/on_runpod/wire.py."""
    listen()

    async def post(snapshot: dict[str, object]) -> None:
        # Not the SDK's progress_update, which posts from a thread of its own, so that the result may overtake it.
        if not worker_state.IS_LOCAL_TEST:
            async with AsyncClientSession() as session:
                await rp_http.send_result(session, {"status": "IN_PROGRESS", "output": snapshot}, job)

    try:
        return await worker().run(job, post)
    finally:
        # The platform may be slow to act on `refresh_worker` in the answer; SIGTERM keeps more jobs away at once.
        if worker().broken and not worker_state.IS_LOCAL_TEST:
            signal.raise_signal(signal.SIGTERM)


@functools.cache
def listen() -> None:
    """Stops running jobs on a signal. The SDK would wait for them without a limit, and RunPod would kill the worker.

    They get I2V_SHUTDOWN_GRACE seconds; then they hand back their leases and are answered.
    """
    loop = asyncio.get_running_loop()
    closing: list[asyncio.Task[None]] = []

    def close() -> None:
        closing.append(loop.create_task(worker().close(settings().shutdown_grace_s)))

    def chain(number: signal.Signals) -> None:
        before = signal.getsignal(number)

        def stop(received: int, frame: FrameType | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(close)
            if callable(before):
                before(received, frame)

        signal.signal(number, stop)

    chain(signal.SIGTERM)
    chain(signal.SIGINT)


def patient(attempts: int) -> aiohttp_retry.FibonacciRetry:
    """The retry policy for posting results: half a minute, also after a broken connection.

    The SDK's own tries for five seconds, and only after a 5xx, so a video in the answer, which is paid for, would be
    lost.
    """
    again = {aiohttp.ClientConnectionError, ConnectionError}  # timeouts are left out: one takes ten minutes
    return aiohttp_retry.FibonacciRetry(2 * attempts, statuses={429}, exceptions=again, max_timeout=30)


def main() -> None:
    """Runs until RunPod stops it. Exits 1 with one line where it cannot begin."""
    logs.configure()
    # While the engine loads; afterwards the SDK sets a handler of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Below INFO the SDK logs whole jobs and answers: photos, URLs with credentials. --rp_log_level DEBUG undoes it.
    if RunPodLogger.level == "DEBUG":
        RunPodLogger().set_level("INFO")
    rp_http.FibonacciRetry = patient
    with told_errors(verbose=False):
        if worker_state.IS_LOCAL_TEST:
            weights_and_gpu()
        else:
            runpod.serverless.register_fitness_check(weights_and_gpu)
        runpod.serverless.start({"handler": handle, "concurrency_modifier": lambda _: settings().concurrency})


if __name__ == "__main__":
    main()
