"""Queues and their storage, opened from settings: the place where a queue is added."""

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from inference.build.extras import needing_extra
from inference.errors import SettingsError
from inference.providers import QueueName
from inference.queues.base import TaskQueue
from inference.settings import QUEUE_URL_FIELDS, Settings
from inference.settings_base import names_of
from inference.transfer.bucket import Bucket, bucket_named_in
from inference.transfer.storage import Storage

if TYPE_CHECKING:
    from inference.queues.gmanimato import GmAnimatoQueue
    from inference.queues.lifeisshort import LifeIsShortQueue
    from inference.queues.video_jobs.schema import Names
    from inference.queues.video_jobs.store import JobStore


def open_storage(settings: Settings, trusted_origins: Sequence[str] | None = None) -> Storage:
    """Downloads and uploads under the limits of `settings`; to be entered.

    `trusted_origins` may be anywhere. None: the queue's own host, which the operator named. Its presigned URLs may lead
    back there, to whichever port: the app and its storage often are two servers of one machine.
    """
    # A database holds no objects. Its address says nothing about where they may be.
    queue_url = None if settings.queue == "video_jobs" else settings.queue_url
    own = [queue_url, settings.public_url, settings.bucket_url] if trusted_origins is None else []
    return Storage(
        trusted_origins=trusted_origins or (),
        trusted_hosts=[url for url in own if url],
        allow_private=settings.allow_private_addresses,
        max_download_bytes=settings.max_photo_bytes,
    )


@asynccontextmanager
async def open_queue(settings: Settings) -> AsyncIterator[TaskQueue]:
    """A connection to the queue that `settings` names. Raises SettingsError."""
    if not settings.queue_url:
        names = names_of(Settings.model_fields[QUEUE_URL_FIELDS[settings.queue]])
        raise SettingsError(f"{' or '.join(names)} is not set")
    async with open_storage(settings) as storage, QUEUES[settings.queue](settings, storage) as queue:
        yield queue


def _life_is_short(settings: Settings, storage: Storage) -> "LifeIsShortQueue":
    from inference.queues.lifeisshort import LifeIsShortQueue  # noqa: PLC0415 - a process has one queue, not all

    return LifeIsShortQueue(
        settings.api_url or "",
        settings.api_key.get_secret_value() if settings.api_key else None,
        worker_id=settings.worker_id,
        storage=storage,
        auth_scheme=settings.auth_scheme,
        worker_type=settings.worker_type,
        lease_s=settings.lease_duration_s,
        extension_s=settings.lease_extension_s,
        bypass=settings.vercel_bypass.get_secret_value() if settings.vercel_bypass else None,
    )


def _gmanimato(settings: Settings, storage: Storage) -> "GmAnimatoQueue":
    from inference.queues.gmanimato import GmAnimatoQueue  # noqa: PLC0415 - as above

    return GmAnimatoQueue(
        settings.gmanimato_url or "",
        settings.gmanimato_secret.get_secret_value() if settings.gmanimato_secret else None,
        worker_id=settings.worker_id,
        storage=storage,
        bucket=bucket_of(settings),
        callback_base_url=settings.gmanimato_callback_url,
        max_body_bytes=settings.webhook_bytes,
        max_photo_bytes=settings.max_photo_bytes,
    )


@asynccontextmanager
async def _video_jobs(settings: Settings, storage: Storage) -> AsyncIterator[TaskQueue]:
    with needing_extra("push", "a queue in PostgreSQL"):
        from inference.queues.video_jobs.queue import VideoJobsQueue  # noqa: PLC0415 - an extra
    bucket = bucket_of(settings)
    if bucket is None:
        raise SettingsError("BUCKET_ENDPOINT_URL is not set: videos of jobs in PostgreSQL go to a bucket")
    # In a thread, since it connects.
    jobs = await anyio.to_thread.run_sync(open_jobs, settings)
    try:
        queue = VideoJobsQueue(
            jobs,
            worker_id=settings.worker_id,
            storage=storage,
            bucket=bucket,
            max_photo_bytes=settings.max_photo_bytes,
        )
    except SettingsError:
        jobs.close()
        raise
    async with queue:
        yield queue


def open_jobs(settings: Settings) -> "JobStore":
    """The table of jobs, to be closed; blocks while it connects. Raises SettingsError, QueueUnavailable."""
    url, names = _jobs_table(settings)
    from inference.queues.video_jobs.store import JobStore  # noqa: PLC0415 - an extra

    return JobStore(url, names, stale_s=settings.jobs_stale_s, worker_type=settings.worker_type)


def migrate_jobs(settings: Settings) -> list[str]:
    """Makes the table of jobs, or adds what it lacks; returns what was made, in words. Blocks.

    Raises SettingsError, QueueUnavailable.
    """
    url, names = _jobs_table(settings)
    from inference.queues.video_jobs.store import create  # noqa: PLC0415 - an extra

    return create(url, names)


def _jobs_table(settings: Settings) -> "tuple[str, Names]":
    with needing_extra("push", "a queue in PostgreSQL"):
        from inference.queues.video_jobs.schema import Names  # noqa: PLC0415 - an extra
    if settings.jobs_database_url is None:
        raise SettingsError("I2V_JOBS_DATABASE_URL is not set: there is no queue without a database")
    names = Names(settings.jobs_table, json.loads(settings.jobs_columns or "{}"))
    return settings.jobs_database_url.get_secret_value(), names


QUEUES: dict[QueueName, Callable[[Settings, Storage], AbstractAsyncContextManager[TaskQueue]]] = {
    "lifeisshort": _life_is_short,
    "gmanimato": _gmanimato,
    "video_jobs": _video_jobs,
}
"""The place where a queue is added."""


def bucket_of(settings: Settings) -> Bucket | None:
    """The operator's bucket. Raises SettingsError where only half of it is said."""
    secret = settings.bucket_secret.get_secret_value() if settings.bucket_secret else None
    name = settings.bucket_name or (bucket_named_in(settings.bucket_url) if settings.bucket_url else None)
    needed = {
        "BUCKET_ENDPOINT_URL": settings.bucket_url,
        "BUCKET_NAME": name,
        "BUCKET_ACCESS_KEY_ID": settings.bucket_key_id,
        "BUCKET_SECRET_ACCESS_KEY": secret,
    }
    missing = [name for name, value in needed.items() if not value]
    if len(missing) == len(needed):
        return None
    if missing:
        raise SettingsError(f"{', '.join(missing)}: not set, though other settings of the bucket are")
    return Bucket(
        settings.bucket_url or "",
        name or "",
        settings.bucket_key_id or "",
        secret or "",
        settings.bucket_region,
    )
