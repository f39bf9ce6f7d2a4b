"""A direct request: a photo comes with the job, and the video goes where the job says or into its answer."""

import base64
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx

from inference import logs
from inference.build.engines import refuse
from inference.build.workers import build_policy
from inference.engines.base import Job
from inference.engines.turns import EngineTurns
from inference.errors import InvalidRequest, ObjectExists, SettingsError, UrlExpired
from inference.leasing.direct import generated
from inference.leasing.retry import Policy, repeat
from inference.leasing.scratch import put, scratch_folder
from inference.media.clip import shrink
from inference.on_runpod.wire import INLINE_BYTES, INLINE_S, PAYLOAD_BYTES, DirectInput, S3Config, answer
from inference.progress.stages import Sink, StageTracker, both, plan
from inference.settings import Settings
from inference.task import PHOTO, Video, asked_as
from inference.transfer.bucket import Bucket
from inference.transfer.storage import Storage
from inference.transfer.url_expiry import ends_at, flaw

SKEW = timedelta(hours=1)
"""How far a worker's clock may be off (reliability.md, rule 4): so late is late by any clock."""


@dataclass(frozen=True)
class DirectContext:
    """What the direct requests of one worker share."""

    settings: Settings
    turns: EngineTurns
    storage: Storage  # for URLs that callers give, which may lead to public addresses only
    bucket: Bucket | None  # the operator's own
    own_storage: Storage  # for that bucket, wherever it is


@dataclass(frozen=True)
class Target:
    """Where a file goes, and under which URL its caller finds it."""

    storage: Storage
    put_url: str
    url: str

    def refuse_flawed(self) -> None:
        """Raises InvalidRequest where nothing can ever be stored here, UrlExpired where nothing can any more."""
        if why := flaw(self.put_url):
            raise InvalidRequest(f"upload_url: it is {why}")
        end = ends_at(self.put_url)
        if end is not None and end <= datetime.now(UTC) - SKEW:
            raise UrlExpired(f"upload_url: it ended at {end:%Y-%m-%d %H:%M:%S} UTC; sign a new one, for longer")

    async def take(self, file: Path, policy: Policy, *, content_type: str = "video/mp4") -> None:
        """Stores a file. Raises StorageError.

        A second try that finds something there finds our own: the answer to the first one was lost.
        """
        tries = 0

        async def once() -> None:
            nonlocal tries
            tries += 1
            try:
                await self.storage.upload(self.put_url, file, content_type=content_type)
            except ObjectExists:
                if tries == 1:
                    raise

        await repeat(once, policy)


async def render(
    asked: DirectInput, s3: S3Config | None, job_id: str, here: DirectContext, sink: Sink
) -> dict[str, Any]:
    """The answer to one direct request. What cannot end well is refused before the GPU is touched.

    The video goes to `upload_url`, else to the bucket of `s3`, else to the operator's, else into the answer.
    Raises InvalidRequest, InvalidPhoto, StorageError, MachineFault, EngineError, MediaError.
    """
    settings, policy = here.settings, build_policy(here.settings)
    target = await anyio.to_thread.run_sync(_target, asked, s3, job_id, here)
    _check(asked, settings, is_inline=target is None)
    if target is not None:
        target.refuse_flawed()
        await target.storage.check(target.put_url)
    tracker = StageTracker(plan(here.turns.stages), both(logs.stages(job_id), sink))
    job = Job(tracker)
    with scratch_folder(settings.temp_dir, keep=policy.keep_temp) as folder:
        job.report("download")
        photo = folder / "photo"
        if asked.photo_url is None:
            await anyio.to_thread.run_sync(lambda: put(photo, asked.photo_bytes(settings.max_photo_bytes)))
        else:
            url = asked.photo_url
            await repeat(lambda: here.storage.download(url, photo), policy)
        check = target.refuse_flawed if target else None
        async with generated(
            here.turns, asked.request, {PHOTO: photo}, folder, job, policy=policy, check=check
        ) as video:
            job.report("upload")
            if target is not None:
                await target.take(video.path, policy)
                return answer(video, tracker.stage_seconds(), url=target.url)
            inline, mp4 = await anyio.to_thread.run_sync(_inline, video, folder)
            return answer(inline, tracker.stage_seconds(), base64=mp4)


def _target(asked: DirectInput, s3: S3Config | None, job_id: str, here: DirectContext) -> Target | None:
    """None: the video comes with the answer. Signing takes half a second the first time, for all that it imports."""
    if asked.upload_url is not None:
        bare = httpx.URL(asked.upload_url).copy_with(query=None, fragment=None, userinfo=b"")
        return Target(here.storage, asked.upload_url, str(bare))
    bucket = bucket_in(s3) or here.bucket
    if bucket is None:
        return None
    key = re.sub(r"[^A-Za-z0-9_-]", "_", job_id) + ".mp4"
    try:
        put_url, url = bucket.upload_url(key, content_type="video/mp4"), bucket.download_url(key)
    except SettingsError as error:
        raise InvalidRequest(f"s3Config: {error}") from None
    return Target(here.storage if s3 else here.own_storage, put_url, url)


def bucket_in(s3: S3Config | None) -> Bucket | None:
    """The bucket that a job brings."""
    if s3 is None:
        return None
    return Bucket(s3.endpointUrl, s3.bucketName, s3.accessId, s3.accessSecret.get_secret_value(), s3.region)


def _check(asked: DirectInput, settings: Settings, *, is_inline: bool) -> None:
    runs = settings.wan_preset if settings.engine == "wan" else settings.engine
    if asked.preset not in (None, runs):
        raise InvalidRequest(f"preset: this endpoint runs {runs}; {asked.preset} needs an endpoint of its own")
    if is_inline and asked.seconds > INLINE_S:
        raise InvalidRequest(
            f"seconds: a video of {asked.seconds:g} s may not fit into an answer, which holds {PAYLOAD_BYTES // 10**6} "
            f"MB; give an upload_url or an s3Config, or set BUCKET_ENDPOINT_URL, or ask for {int(INLINE_S)} s at most"
        )
    with asked_as({"duration_s": "seconds"}):
        refuse(settings, asked.request)


def _inline(video: Video, folder: Path) -> tuple[Video, str]:
    """The mp4 as base64: as it is where an answer has room for it, else encoded again, for it is paid for already."""
    if video.size_bytes > INLINE_BYTES:
        smaller = folder / "smaller.mp4"
        shrink(video.path, smaller, INLINE_BYTES)
        video = video.model_copy(update={"path": smaller, "size_bytes": smaller.stat().st_size})
    return video, base64.b64encode(video.path.read_bytes()).decode("ascii")
