"""The embedded queue in the process of a command."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskStatus

from inference import process, terminal
from inference.build.server import build_server_config
from inference.build.workers import open_events
from inference.settings import Settings

POLL_AT_HOME_S = 1.0
"""The longest pause between questions to the queue of the same process, which cost nothing."""


EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - compared
"""Every address of this machine, and one of them at which this machine itself finds the server."""


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Settings]:
    """The embedded queue for the length of a block; yields settings with which a worker on this machine reaches it.

    If the block is cancelled, the queue stays open until it has ended, so that its worker can hand leases back.
    """
    config = build_server_config(settings)
    from inference.server.serve import serve as serve_queue  # noqa: PLC0415 - an extra

    lifetime = anyio.CancelScope(shield=True)

    async def run(*, task_status: TaskStatus[tuple[str, int]]) -> None:
        with lifetime:
            await serve_queue(config, settings.host, settings.port, hub=hub, task_status=task_status)

    async with open_events(settings) as hub, anyio.create_task_group() as tasks:
        try:
            # Shielded too: a start that is cancelled waits for its task to end, which `lifetime` would keep it from.
            with anyio.CancelScope(shield=True):
                host, port = await tasks.start(run)
            process.settle()
            reachable = EVERYWHERE.get(host) or (f"[{host}]" if ":" in host else host)
            yield settings.model_copy(update={"api_url": f"http://{reachable}:{port}"})
        finally:
            lifetime.cancel()


def at_home(settings: Settings) -> Settings:
    """Settings of a worker whose queue is in the same process."""
    return settings.model_copy(update={"poll_interval_s": min(settings.poll_interval_s, POLL_AT_HOME_S)})


def tell_page(here: Settings) -> None:
    """Where the queue's page is, and what it asks for."""
    key = "" if here.api_key is None else ", and sign in with the key that WORKER_API_KEY has"
    terminal.headline(f"Open {here.api_url} in a browser{key}.")
    if here.host in EVERYWHERE:
        terminal.say(
            "Other machines use this one's address in the place of 127.0.0.1. Key and photos are not encrypted:"
        )
        terminal.say("beyond a network you trust, put a proxy with TLS in front (I2V_PUBLIC_URL: its address).")
