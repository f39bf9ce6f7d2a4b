"""Fetches weights at their pinned revision and verifies them; complete files, and parts of files, are kept."""

import importlib.util
import math
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from inference.engines.wan import bf16, weights
from inference.engines.wan.hub import ENDPOINT, PAUSES_S, Hub
from inference.engines.wan.presets import Component, Lora, Preset, Repository
from inference.engines.wan.weights import INDEX, TENSORS, Entry, Lock, Report, Sink, weights_error
from inference.errors import DiskFull
from inference.progress.files import FileProgress

if sys.platform != "win32":
    import fcntl

PARTIAL = ".partial"

log = structlog.get_logger(__name__)


def fetch(
    preset: Preset,
    weights_dir: Path,
    *,
    sink: Sink | None = None,
    endpoint: str | None = None,  # a mirror of huggingface.co
    token: str | None = None,
    accept_non_commercial: bool = False,
    at_most_bytes: float = math.inf,
    pauses_s: Sequence[float] = PAUSES_S,
) -> int:
    """Fetches missing files and returns how many there were; if none is missing, no request is made.

    Blocks. Continues where an earlier call stopped, however that ended. Needs disk space for the finished files and one
    more. `at_most_bytes` limits what one call adds, to one file at least: registries limit the size of image layers.

    Raises WeightsError, DiskFull; ValueError for a preset that is built here.
    """
    for repository in preset.repositories:
        if repository.built_here:
            raise ValueError(f"{preset.name} is built here, not fetched")
        if not (repository.commercial_use or accept_non_commercial):
            raise weights_error(
                f"{repository.name} is for non-commercial use only ({repository.license}): "
                "if yours is, repeat with --accept-non-commercial"
            )
    jobs: list[_FileFetch] = []
    with weights.mapped(weights_dir), ExitStack() as stack:
        hub = stack.enter_context(Hub(endpoint or ENDPOINT, token, pauses_s))
        for repository in preset.repositories:
            folder = weights.folder_of(weights_dir, repository)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_alone(folder))
            jobs += _jobs(_listed(preset, repository, folder, hub), weights.parts_of(preset, repository), folder)
        _refuse_the_impossible(jobs, weights_dir)
        put_bytes = 0
        for number, job in enumerate(jobs, 1):
            if put_bytes and put_bytes + job.size_bytes > at_most_bytes:
                log.info("weights fetched so far", preset=preset.name, files=number - 1, to_come=len(jobs) - number + 1)
                return number - 1
            put_bytes += job.size_bytes
            progress = FileProgress(job.lock.repository, job.path, job.entry.published_bytes, number, len(jobs))
            job.run(hub, weights.reporter(sink, progress))
        for repository in preset.repositories:
            shutil.rmtree(weights.folder_of(weights_dir, repository) / PARTIAL, ignore_errors=True)
        if problems := weights.check(preset, weights_dir, thorough=False):
            raise weights_error(f"{problems[0]}, and was not published either")
    log.info("weights fetched" if jobs else "weights were there already", preset=preset.name, files=len(jobs))
    return len(jobs)


# What has to be fetched


def _listed(preset: Preset, repository: Repository, folder: Path, hub: Hub) -> Lock:
    """The lock, with every file of a repository that the preset needs. Asks the hub only if one is not in it."""
    parts = weights.parts_of(preset, repository)

    def lacking(paths: Iterable[str]) -> list[str]:
        return [part.path for part in parts if not any(weights.covers(part, path) for path in paths)]

    lock = Lock.read(repository, folder)
    if lock and not lacking(lock.files):
        return lock
    pinned = lock.revision if lock else repository.revision
    published = hub.listing(repository.name, pinned or "main")
    if pinned is None:
        log.warning("no revision is pinned", repository=repository.name, taken=published.revision)
    elif published.revision != pinned:
        raise weights_error(
            f"{repository.name}: the hub answered with revision {published.revision}, pinned is {pinned}"
        )
    wanted = {
        path: entry for path, entry in published.files.items() if any(weights.covers(part, path) for part in parts)
    }
    for path in lacking(wanted):
        raise weights_error(f"{repository.name} has no {path} at revision {published.revision}: correct the preset")
    lock = Lock(repository=repository.name, revision=published.revision, files=wanted | (lock.files if lock else {}))
    lock.save(folder)
    return lock


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Locks a folder for writing. Raises WeightsError where another process has the lock."""
    with (folder / ".fetch.lock").open("w") as file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise weights_error(f"another fetch is at work in {folder}: wait until it has ended") from None
            except OSError:
                log.warning("this file system has no locks: see that nobody else fetches", folder=str(folder))
        yield


# One file


@dataclass(frozen=True)
class _FileFetch:
    """A file that has to be fetched."""

    folder: Path
    lock: Lock
    path: str
    as_bf16: bool

    @property
    def entry(self) -> Entry:
        return self.lock.files[self.path]

    @property
    def size_bytes(self) -> int:
        """The size of the finished file, to a percent: a file that is converted from fp32 to bf16 has half the size."""
        published_bytes = self.entry.published_bytes
        return published_bytes // 2 if self.as_bf16 and self.path.endswith(TENSORS) else published_bytes

    @property
    def partial(self) -> Path:
        """Where the file arrives. Its name is the digest of the content, so only the same content is ever continued."""
        return self.folder / PARTIAL / self.entry.published_digest

    def run(self, hub: Hub, report: Report) -> None:
        """Puts the file in its place and into the lock. Raises WeightsError, OSError."""
        target = self.folder / self.path
        for folder in (self.partial.parent, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        self._download(hub, report)
        new = self.partial
        if self.as_bf16 and self.path.endswith((TENSORS, INDEX)):
            new = self.partial.with_suffix(".bf16")
            if self.path.endswith(TENSORS):
                bf16.save_shard(self.partial, new, report)
            else:
                bf16.save_index(self.partial, target.parent, new)
        as_published = new == self.partial and len(self.entry.published_digest) == 64
        sha256 = self.entry.published_digest if as_published else weights.sha256(new)
        here = {"sha256": sha256, "size_bytes": weights.bytes_at(new)}
        new.replace(target)
        self.lock.files[self.path] = self.entry.model_copy(update=here)
        self.lock.save(self.folder)
        self.partial.unlink(missing_ok=True)

    def _download(self, hub: Hub, report: Report) -> None:
        for _ in range(2):
            hub.download(self.lock, self.path, self.partial, report)
            digest = weights.sha256 if len(self.entry.published_digest) == 64 else weights.git_sha1
            if digest(self.partial, report) == self.entry.published_digest:
                return
            self.partial.unlink()
        raise weights_error(f"{self.lock.repository}: {self.path} came twice with another content than published")


def _jobs(lock: Lock, parts: list[Component | Lora], folder: Path) -> Iterator[_FileFetch]:
    # Indexes last: they are rewritten with the size of the shards, which may have been converted.
    for path in sorted(lock.files, key=lambda path: (path.endswith(INDEX), path)):
        part = next((part for part in parts if weights.covers(part, path)), None)
        if part and not lock.files[path].is_whole(folder / path):
            yield _FileFetch(folder, lock, path, as_bf16=isinstance(part, Component) and part.save_as_bf16)


def _refuse_the_impossible(jobs: list[_FileFetch], weights_dir: Path) -> None:
    """Checks for problems that would otherwise show after an hour of fetching. Raises WeightsError, DiskFull."""
    converted = [job.entry.published_bytes for job in jobs if job.as_bf16 and job.path.endswith(TENSORS)]
    if converted and not (importlib.util.find_spec("torch") and importlib.util.find_spec("safetensors")):
        raise weights_error("saving weights as bf16 takes torch: pip install 'serverless-i2v[wan]'")
    # Converting halves a file, but needs room for both versions meanwhile.
    all_bytes = sum(job.entry.published_bytes for job in jobs) - sum(converted) // 2 + max(converted, default=0)
    needed_bytes = all_bytes - sum(weights.bytes_at(job.partial) for job in jobs)
    free_bytes = shutil.disk_usage(weights_dir).free
    if needed_bytes > free_bytes:
        raise DiskFull(
            f"{needed_bytes / 1e9:.3g} GB are to come and {free_bytes / 1e9:.3g} GB are free in {weights_dir}: "
            "free some, or set I2V_WEIGHTS_DIR to another folder"
        )
