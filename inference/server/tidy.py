"""Removes what is no longer needed, while the server runs.

That is: tasks past their retention, with photos and videos; videos that no task names, such as those of a worker that
lost its lease; unfinished uploads of killed processes. Several servers on one database and folder may do so at once.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

import anyio
import anyio.to_thread
import structlog

from inference.errors import I2VError
from inference.server.config import ServerConfig
from inference.server.objects import STALE_S, ObjectStore
from inference.server.rows.store import Store
from inference.server.storage_api import VIDEOS

PAUSE_S = 300.0
"""Between one round and the next."""

KEY_S = 24 * 3600
"""How long an Idempotency-Key is remembered at least. No client repeats a request for longer."""

PAGE = 100
"""Rows or objects per page; the server may stop between two pages."""

DAY_S = 24 * 3600

log = structlog.get_logger(__name__)


def sweep(store: Store, objects: ObjectStore, config: ServerConfig, *, stale_s: float = STALE_S) -> Iterator[int]:
    """One round, a page at a time; yields how much each page removed. `sum(sweep(…))` runs it to its end.

    `stale_s`: seconds for which a photo without a row may be one that is just being added. Raises QueueUnavailable,
    StorageUnavailable.
    """
    if config.retention_days is not None:
        while ended := store.removal.delete_ended(config.retention_days * DAY_S, PAGE):
            yield ended
    store.forget_keys(KEY_S)
    store.removal.forget_named()
    keep_s = config.url_lifetime_s + STALE_S
    after = ""
    while page := store.removal.nobodys(stale_s, keep_s, after=after, limit=PAGE):
        after = page[-1].path
        # Most of these objects were never stored, or were removed in an earlier round.
        there = {it.path for it in page if objects.exists(it.path)}
        for it in page:
            if it.is_over or it.path in there:
                is_removed = store.removal.discard(it.path, objects.remove, stale_s, keep_s)
                if not is_removed:
                    there.discard(it.path)
        yield len(there)
    yield objects.clear_incoming()


def adopt(store: Store, objects: ObjectStore) -> Iterator[int]:
    """Records videos that servers of earlier versions stored without recording them; in pages, as `sweep`.

    Raises QueueUnavailable, StorageUnavailable.
    """
    for number, path in enumerate(objects.names(VIDEOS.rstrip("/")), 1):
        store.removal.adopt(path, path.removeprefix(VIDEOS).partition(".")[0])
        if number % PAGE == 0:
            yield 0
    yield 0


def discard(paths: Iterable[str], store: Store, objects: ObjectStore, config: ServerConfig) -> None:
    """Removes objects without a row. Those that cannot be removed now are removed in a later round."""
    for path in paths:
        try:
            store.removal.discard(path, objects.remove, keep_s=config.url_lifetime_s + STALE_S)
        except I2VError as error:
            log.warning("an object could not be removed yet", path=path, problem=str(error))


async def keep_tidy(store: Store, objects: ObjectStore, config: ServerConfig) -> None:
    """Sweeps now and from then on, until it is cancelled."""
    pages: Iterator[int] = chain(adopt(store, objects), sweep(store, objects, config))
    while True:
        removed = 0
        try:
            while (page := await anyio.to_thread.run_sync(next, pages, None)) is not None:
                removed += page
            if removed:
                log.info("tidied up", removed=removed)
        except I2VError as error:
            log.warning("could not tidy up, trying again later", problem=str(error))
        await anyio.sleep(PAUSE_S)
        pages = sweep(store, objects, config)
