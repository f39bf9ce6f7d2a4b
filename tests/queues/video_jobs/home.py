"""Where the tasks of a VideoJobsQueue live, for the contract suite: a table in PostgreSQL, and a bucket on loopback."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from inference.queues.item import Item, ItemProgress
from inference.queues.video_jobs.queue import VideoJobsQueue
from inference.queues.video_jobs.store import JobStore
from inference.transfer.bucket import Bucket
from inference.transfer.storage import Storage
from tests.queues.video_jobs.subjects import OURS, SqlSubject
from tests.support.s3_server import S3Server

WORDS = {"queued": "pending", "canceled": "cancelled"}


class VideoJobsHome:
    """See Home in the contract suite."""

    def __init__(self, url: str, s3: S3Server, storage: Storage):
        self.sql, self.s3, self.storage = SqlSubject(url), s3, storage
        self.bucket = Bucket(s3.url, s3.bucket, s3.key_id, s3.secret)
        self.added = 0
        self.stores: list[JobStore] = []

    def connect(self, worker_id="worker", worker_type=None):
        """See Home."""
        store = self.sql.store
        if worker_type is not None:
            store = JobStore(self.sql.url, OURS, stale_s=self.sql.store.stale_s, worker_type=worker_type)
            self.stores.append(store)
        return VideoJobsQueue(store, worker_id=worker_id, storage=self.storage, bucket=self.bucket)

    def add(self, photo, **fields):
        """See Home."""
        self.added += 1
        job_id = f"job-{self.added}"
        self.put(f"photos/{job_id}.jpg", photo)
        names = {"inference_provider": "provider"}
        content = {names.get(name, name): value for name, value in fields.items()}
        self.sql.store.add(job_id, {"photo": f"photos/{job_id}.jpg", **content})
        return job_id

    def item(self, item_id):
        """See Home."""
        job = self.sql.store.get(item_id)
        told = job.progress
        return Item(
            id=job.id,
            group_id="",
            photo_id="",
            photo_storage_path=job.input["photo"],
            status=WORDS.get(job.status, job.status),
            worker_id=f"{job.worker}.{job.attempt_id}" if job.attempt_id else None,
            crash_count=job.crashes,
            lost_count=job.losses,
            retry_count=int(job.status == "failed"),
            progress=ItemProgress(stage=told["stage"], fraction=told["fraction"]) if told and "stage" in told else None,
            video_storage_path=job.artifact_key,
            error_message=job.error,
            created_at=0,
            updated_at=0,
        )

    def expire(self, item_id):
        """See Home."""
        self.sql.expire(item_id)

    def cancel(self, item_id):
        """See Home."""
        self.sql.store.cancel(item_id)

    def object(self, path):
        """See Home."""
        return self.s3.object_bytes(path)

    def put(self, path, body):
        """See Home."""
        headers = {"Content-Type": "image/jpeg"}
        url = self.bucket.upload_url(path, content_type=headers["Content-Type"])
        httpx.put(url, content=body, headers=headers).raise_for_status()

    def lose_photo(self, item_id):
        """See Home."""
        httpx.delete(self.bucket._signed("delete_object", f"photos/{item_id}.jpg", 60)).raise_for_status()

    def close(self):
        """Closes every connection."""
        for store in self.stores:
            store.close()
        self.sql.close()


@asynccontextmanager
async def video_jobs_home(url: str, s3: S3Server) -> AsyncIterator[VideoJobsHome]:
    """An empty table in the database at `url`, and an empty bucket."""
    SqlSubject.prepare(url, OURS)
    async with Storage(trusted_origins=[s3.url]) as storage:
        home = VideoJobsHome(url, s3, storage)
        yield home
        home.close()
