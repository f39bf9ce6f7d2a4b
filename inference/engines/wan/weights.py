"""Weights on disk: fetched at their pinned revision, verified, and known by what was fetched.

    <weights_dir>/Wan-AI--Wan2.2-I2V-A14B-Diffusers/
        transformer/…           files under the paths they have in their repository
        weights.lock.json       the revision; of each file what was published, and what lies here
        .partial/<digest>       what is still arriving; the next fetch goes on from there

Plain HTTP with ranges. huggingface_hub is left out on purpose: it begins a file anew after every interruption
(github.com/huggingface/huggingface_hub/issues/4196), and the largest have ten gigabytes.

Nothing here imports torch until a file is converted: an engine calls `require` and `read_ahead` before it does.
"""

import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx
import structlog
from pydantic import BaseModel, Field, ValidationError

from inference.engines.wan.presets import Component, Lora, Preset, Repository
from inference.errors import DiskFull, WeightsError, one_line

if sys.platform != "win32":
    import fcntl

T = TypeVar("T")

ENDPOINT = "https://huggingface.co"
CONNECT_TIMEOUT_S = 10.0
IDLE_TIMEOUT_S = 30.0
"""A download that moves no byte for this long is dead."""
PAUSES_S = (1.0, 5.0, 20.0)
"""Before each new try. Bytes that arrive start them over."""

LOCK = "weights.lock.json"
PARTIAL = ".partial"
TENSORS = ".safetensors"
INDEX = ".safetensors.index.json"
LOADABLE = (TENSORS, ".json", ".model", ".txt")
"""What loading reads: no pictures, and never a pickle."""

KEPT_IN_FP32 = frozenset({"rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"})
"""Parts of the names of tensors that stay as published (diffusers, WanTransformer3DModel._keep_in_fp32_modules)."""

READ_AHEAD_BYTES = 64 * 1024 * 1024
"""A read. 2 GB from a cold disk beside a busy interpreter: 1.4 s, and 10.4 s by the MiB, since every return waits for
the interpreter's lock. posix_fadvise(WILLNEED) takes in 8 MB of a file and no more; by the MiB it waits likewise."""

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CHUNK_BYTES = 1024 * 1024  # per read, where content is hashed
MAX_MESSAGE_CHARS = 500

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class FileProgress:
    """How far one file is."""

    repository: str
    path: str  # in its repository
    size_bytes: int  # as published; in a check, of what lies here
    number: int  # of this file, from 1
    count: int  # of the files of this call
    step: Literal["download", "verify", "convert"] = "download"
    done_bytes: int = 0


Sink = Callable[[FileProgress], None]


Digest = Annotated[str, Field(pattern="^([0-9a-f]{64}|[0-9a-f]{40})$")]
"""The hub's name for content: of an LFS file its sha256, of any other git's sha1. Here it names files, too."""


class Entry(BaseModel):
    """One file, as it was published and as it lies here."""

    published_digest: Digest
    published_bytes: Annotated[int, Field(ge=0)]
    sha256: str | None = None  # None until it is here
    size_bytes: int | None = None


class Lock(BaseModel):
    """What a repository's folder holds, or will when the fetch is through."""

    repository: str
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
    files: dict[str, Entry]  # by their paths

    def save(self, folder: Path) -> None:
        """In one step. Raises OSError."""
        new = folder / f".{LOCK}.new"
        new.write_text(json.dumps(self.model_dump(), indent=2, sort_keys=True) + "\n")
        new.replace(folder / LOCK)


def folder_of(weights_dir: Path, repository: Repository) -> Path:
    """Where the files of a repository lie."""
    return weights_dir / repository.folder


def fetch(
    preset: Preset,
    weights_dir: Path,
    *,
    sink: Sink | None = None,
    endpoint: str | None = None,  # a mirror of huggingface.co
    token: str | None = None,
    accept_non_commercial: bool = False,
    pauses_s: Sequence[float] = PAUSES_S,
) -> int:
    """Fetches what is not there yet and returns how many files that were; 0, without a request, if all are there.

    Blocks. Goes on where an earlier call stopped, however that ended. Takes the space of the finished files and of
    one more. Raises WeightsError, DiskFull; ValueError for a preset that is built here.
    """
    for repository in preset.repositories:
        if repository.built_here:
            raise ValueError(f"{preset.name} is built here, not fetched")
        if not (repository.commercial_use or accept_non_commercial):
            raise _error(
                f"{repository.name} is for non-commercial use only ({repository.license}): "
                "if yours is, repeat with --accept-non-commercial"
            )
    jobs: list[_Job] = []
    with _mapped(weights_dir), ExitStack() as stack:
        hub = stack.enter_context(_Hub(endpoint or ENDPOINT, token, pauses_s))
        for repository in preset.repositories:
            folder = folder_of(weights_dir, repository)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_alone(folder))
            jobs += _jobs(_listed(preset, repository, folder, hub), _parts(preset, repository), folder)
        _refuse_the_impossible(jobs, weights_dir)
        for number, job in enumerate(jobs, 1):
            progress = FileProgress(job.lock.repository, job.path, job.entry.published_bytes, number, len(jobs))
            job.run(hub, _reporter(sink, progress))
        for repository in preset.repositories:
            shutil.rmtree(folder_of(weights_dir, repository) / PARTIAL, ignore_errors=True)
        if problem := next(_problems(preset, weights_dir), None):
            raise _error(f"{problem}, and was not published either")
    log.info("weights fetched" if jobs else "weights were there already", preset=preset.name, files=len(jobs))
    return len(jobs)


def check(preset: Preset, weights_dir: Path, *, thorough: bool = True, sink: Sink | None = None) -> list[str]:
    """What is wrong with the weights of a preset, a line each; nothing if all is well.

    `thorough` reads every byte; without it, names and sizes are compared. Raises WeightsError for what it may not read.
    """
    with _mapped(weights_dir):
        return list(dict.fromkeys(_problems(preset, weights_dir, thorough=thorough, sink=sink)))


def require(preset: Preset, weights_dir: Path) -> None:
    """Compares names and sizes, in milliseconds. Raises WeightsError with the first problem and the way out."""
    with _mapped(weights_dir):
        if problem := next(_problems(preset, weights_dir), None):
            raise _error(f"{problem}; run: i2v weights fetch {preset.name}")


def weight_files(preset: Preset, weights_dir: Path) -> list[Path]:
    """The safetensors files of a preset, in the order of its parts."""
    found: list[Path] = []
    for part in _parts(preset):
        path = folder_of(weights_dir, part.repository) / part.path
        found += sorted(path.glob(f"*{TENSORS}")) if isinstance(part, Component) else [path]
    return found


def read_ahead(paths: Iterable[Path]) -> threading.Thread:
    """Has files read into the operating system's cache while something else goes on, such as importing torch.

    Returns at once and raises nothing; the thread ends with the last byte. Give it no more than fits into memory.
    """

    def read(paths: list[Path]) -> None:
        buffer = bytearray(READ_AHEAD_BYTES)
        for path in paths:
            with suppress(OSError), path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    thread = threading.Thread(target=read, args=(list(paths),), name="read-ahead", daemon=True)
    thread.start()
    return thread


# What is there, and what should be


def _parts(preset: Preset, repository: Repository | None = None) -> list[Component | Lora]:
    parts: list[Component | Lora] = [*preset.components.values(), *preset.loras]
    return [part for part in parts if repository in {None, part.repository}]


def _covers(part: Component | Lora, path: str) -> bool:
    return path == part.path or path.startswith(f"{part.path}/")


def _is_whole(path: Path, entry: Entry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size_bytes


def _read_lock(repository: Repository, folder: Path) -> Lock | None:
    try:
        lock = Lock.model_validate_json((folder / LOCK).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise _error(f"{folder / LOCK} is damaged: remove {folder}") from None
    if repository.revision not in {None, lock.revision}:
        raise _error(f"{folder} holds revision {lock.revision}, not the pinned {repository.revision}: remove it")
    return lock


def _problems(preset: Preset, weights_dir: Path, *, thorough: bool = False, sink: Sink | None = None) -> Iterator[str]:
    for repository in preset.repositories:
        if repository.built_here:
            continue
        folder, parts = folder_of(weights_dir, repository), _parts(preset, repository)
        try:
            lock = _read_lock(repository, folder)
        except WeightsError as error:
            yield str(error)
            continue
        if lock is None:
            yield f"{folder / LOCK} is missing"
            continue
        entries = {path: lock.files[path] for path in sorted(lock.files) if any(_covers(part, path) for part in parts)}
        for number, (name, entry) in enumerate(entries.items(), 1):
            path = folder / name
            if not path.is_file():
                yield f"{path} is missing"
            elif not _is_whole(path, entry):
                yield f"{path} is not whole"
            elif thorough:
                progress = FileProgress(lock.repository, name, entry.size_bytes or 0, number, len(entries))
                if _sha256(path, _reporter(sink, progress)) != entry.sha256:
                    yield f"{path} is damaged: remove it"
    yield from _unloadable(preset, weights_dir)


def _unloadable(preset: Preset, weights_dir: Path) -> Iterator[str]:
    """What loading would stumble over, whether a lock knows of it or not."""
    needed = [folder_of(weights_dir, lora.repository) / lora.path for lora in preset.loras]
    for name, component in preset.components.items():
        folder = folder_of(weights_dir, component.repository) / component.path
        if name == "tokenizer":
            needed.append(folder / "tokenizer_config.json")
            continue
        needed.append(folder / "config.json")
        indexes = list(folder.glob(f"*{INDEX}"))
        if not indexes and not any(folder.glob(f"*{TENSORS}")):
            needed.append(folder / f"*{TENSORS}")
        for index in indexes:
            try:
                needed += [folder / shard for shard in _shards(_read_index(index))]
            except WeightsError as error:
                yield str(error)
    yield from (f"{path} is missing" for path in needed if not path.is_file())


def _read_index(path: Path) -> dict[str, Any]:
    with suppress(ValueError):
        index = json.loads(path.read_bytes())
        if isinstance(index, dict) and isinstance(index.get("weight_map"), dict):
            return index
    raise _error(f"{path} is damaged: remove it")


def _shards(index: dict[str, Any]) -> list[str]:
    return sorted({str(shard) for shard in index["weight_map"].values()})


def _listed(preset: Preset, repository: Repository, folder: Path, hub: "_Hub") -> Lock:
    """The lock, with every file of a repository that the preset needs. Asks the hub only if one is not in it."""
    parts = _parts(preset, repository)

    def lacking(paths: Iterable[str]) -> list[str]:
        return [part.path for part in parts if not any(_covers(part, path) for path in paths)]

    lock = _read_lock(repository, folder)
    if lock and not lacking(lock.files):
        return lock
    pinned = lock.revision if lock else repository.revision
    published = hub.listing(repository.name, pinned or "main")
    if pinned is None:
        log.warning("no revision is pinned", repository=repository.name, taken=published.revision)
    elif published.revision != pinned:
        raise _error(f"{repository.name}: the hub answered with revision {published.revision}, pinned is {pinned}")
    wanted = {path: entry for path, entry in published.files.items() if any(_covers(part, path) for part in parts)}
    for path in lacking(wanted):
        raise _error(f"{repository.name} has no {path} at revision {published.revision}: correct the preset")
    lock = Lock(repository=repository.name, revision=published.revision, files=wanted | (lock.files if lock else {}))
    lock.save(folder)
    return lock


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the right to write into a folder. Raises WeightsError where another process has it."""
    with (folder / ".fetch.lock").open("w") as file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _error(f"another fetch is at work in {folder}: wait until it has ended") from None
            except OSError:
                log.warning("this file system has no locks: see that nobody else fetches", folder=str(folder))
        yield


# One file


Report = Callable[[Literal["download", "verify", "convert"], int], None]  # the step, and its done_bytes


def _reporter(sink: Sink | None, progress: FileProgress) -> Report:
    return lambda step, done_bytes: sink(replace(progress, step=step, done_bytes=done_bytes)) if sink else None


@dataclass(frozen=True)
class _Job:
    """A file that is to come."""

    folder: Path
    lock: Lock
    path: str
    as_bf16: bool

    @property
    def entry(self) -> Entry:
        return self.lock.files[self.path]

    @property
    def partial(self) -> Path:
        """Named for what it will hold, so that nothing else is ever continued."""
        return self.folder / PARTIAL / self.entry.published_digest

    def run(self, hub: "_Hub", report: Report) -> None:
        """Puts the file in its place and into the lock. Raises WeightsError, OSError."""
        target = self.folder / self.path
        for folder in (self.partial.parent, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        self._download(hub, report)
        new = self.partial
        if self.as_bf16 and self.path.endswith((TENSORS, INDEX)):
            new = self.partial.with_suffix(".bf16")
            if self.path.endswith(TENSORS):
                _save_as_bf16(self.partial, new, report)
            else:
                _save_index(_read_index(self.partial), target.parent, new)
        as_published = new == self.partial and len(self.entry.published_digest) == 64
        sha256 = self.entry.published_digest if as_published else _sha256(new)
        here = {"sha256": sha256, "size_bytes": _size_bytes(new)}
        new.replace(target)
        self.lock.files[self.path] = self.entry.model_copy(update=here)
        self.lock.save(self.folder)
        self.partial.unlink(missing_ok=True)

    def _download(self, hub: "_Hub", report: Report) -> None:
        for _ in range(2):
            hub.download(self.lock, self.path, self.partial, report)
            digest = _sha256 if len(self.entry.published_digest) == 64 else _git_sha1
            if digest(self.partial, report) == self.entry.published_digest:
                return
            self.partial.unlink()
        raise _error(f"{self.lock.repository}: {self.path} came twice with another content than published")


def _jobs(lock: Lock, parts: list[Component | Lora], folder: Path) -> Iterator[_Job]:
    # Indexes last: they are saved again with the size of the shards beside them.
    for path in sorted(lock.files, key=lambda path: (path.endswith(INDEX), path)):
        part = next((part for part in parts if _covers(part, path)), None)
        if part and not _is_whole(folder / path, lock.files[path]):
            yield _Job(folder, lock, path, as_bf16=isinstance(part, Component) and part.save_as_bf16)


def _refuse_the_impossible(jobs: list[_Job], weights_dir: Path) -> None:
    """What would go wrong an hour later. Raises WeightsError, DiskFull."""
    converted = [job.entry.published_bytes for job in jobs if job.as_bf16 and job.path.endswith(TENSORS)]
    if converted and not (importlib.util.find_spec("torch") and importlib.util.find_spec("safetensors")):
        raise _error("saving weights as bf16 takes torch: pip install 'serverless-i2v[wan]'")
    # Converting halves a file; while it does, both are there.
    all_bytes = sum(job.entry.published_bytes for job in jobs) - sum(converted) // 2 + max(converted, default=0)
    needed_bytes = all_bytes - sum(_size_bytes(job.partial) for job in jobs)
    free_bytes = shutil.disk_usage(weights_dir).free
    if needed_bytes > free_bytes:
        raise DiskFull(
            f"{needed_bytes / 1e9:.3g} GB are to come and {free_bytes / 1e9:.3g} GB are free in {weights_dir}: "
            "free some, or set I2V_WEIGHTS_DIR to another folder"
        )


def _save_as_bf16(published: Path, new: Path, report: Report) -> None:
    """As loading with torch_dtype=bfloat16 leaves the tensors. Takes memory for half of what was published."""
    import torch  # noqa: PLC0415  see the module
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    done_bytes = 0
    tensors = {}
    try:
        with safe_open(published, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  it is no dict
                tensor = shard.get_tensor(name)
                kept = not tensor.is_floating_point() or not KEPT_IN_FP32.isdisjoint(name.split("."))
                tensors[name] = tensor if kept else tensor.to(torch.bfloat16)
                done_bytes += tensor.nbytes
                report("convert", done_bytes)
            save_file(tensors, new, metadata=shard.metadata() or {"format": "pt"})
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):  # such as a full disk, in words
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(new)) from None
        raise _error(f"{published} is no safetensors file: {error}") from None
    new.chmod(published.stat().st_mode)  # save_file lets nobody else read it


def _save_index(index: dict[str, Any], folder: Path, new: Path) -> None:
    """With the size of the shards as they lie in `folder`."""
    total_bytes = 0
    for shard in _shards(index):
        with (folder / shard).open("rb") as file:  # the length of the header, the header, the tensors
            total_bytes += _size_bytes(folder / shard) - 8 - int.from_bytes(file.read(8), "little")
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": total_bytes}
    new.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path, report: Report | None = None) -> str:
    return _digest(hashlib.sha256(), path, report)


def _git_sha1(path: Path, report: Report) -> str:
    return _digest(hashlib.sha1(b"blob %d\0" % _size_bytes(path), usedforsecurity=False), path, report)


def _digest(digest: Any, path: Path, report: Report | None) -> str:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if report:
                report("verify", file.tell())
    return str(digest.hexdigest())


# The hub


class _Hub:
    """What huggingface.co, or a mirror of it, publishes."""

    def __init__(self, endpoint: str, token: str | None, pauses_s: Sequence[float]) -> None:
        if token and not re.fullmatch("[!-~]+", token):
            raise _error("the token for the hub has characters that no token has")
        headers = {"Accept-Encoding": "identity", "User-Agent": "serverless-i2v"}  # identity, or ranges would not fit
        if token:
            headers["Authorization"] = f"Bearer {token}"  # httpx drops it where a redirect leads to another origin
        try:
            timeout = httpx.Timeout(IDLE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
            self._client = httpx.Client(base_url=endpoint, headers=headers, timeout=timeout, follow_redirects=True)
        except (httpx.InvalidURL, UnicodeError):
            raise _error(f"the hub's address is not a URL such as {ENDPOINT}") from None
        self._pauses_s = pauses_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def listing(self, name: str, revision: str) -> Lock:
        """Every file of a revision that loading could read. Raises WeightsError."""

        def ask() -> bytes:
            path = f"/api/models/{name}/revision/{quote(revision, safe='')}"
            with self._answer(path, f"{name} at {revision}", params={"blobs": "true"}) as response:
                return response.read()

        files = {}
        try:
            said = json.loads(self._persist(ask))
            for file in said["siblings"]:
                path, lfs = file["rfilename"], file.get("lfs")
                if path.endswith(LOADABLE) and ".." not in path.split("/"):
                    files[path] = Entry(
                        published_digest=lfs["sha256"] if lfs else file["blobId"],
                        published_bytes=lfs["size"] if lfs else file["size"],
                    )
            return Lock(repository=name, revision=said["sha"], files=files)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise _error(f"{self._client.base_url.host} does not answer as a hub about {name}") from None

    def download(self, lock: Lock, path: str, partial: Path, report: Report) -> None:
        """Adds to `partial` what it lacks. Raises WeightsError, OSError."""
        size_bytes = lock.files[path].published_bytes
        url = f"/{lock.repository}/resolve/{lock.revision}/{quote(path)}"

        def ask() -> None:
            with partial.open("ab") as file:
                headers = {"Range": f"bytes={file.tell()}-"} if file.tell() else {}
                with self._answer(url, f"{lock.repository}: {path}", headers=headers) as response:
                    if response.status_code != 206:  # the whole instead of the rest; or no such rest (416)
                        file.seek(0)
                        file.truncate()
                    if response.status_code == 416:
                        raise httpx.RemoteProtocolError("the hub's file is shorter")
                    for chunk in response.iter_bytes():
                        file.write(chunk)
                        report("download", file.tell())
                        if file.tell() > size_bytes:
                            return
            if _size_bytes(partial) < size_bytes:
                raise httpx.RemoteProtocolError("ended early")

        partial.touch()
        if _size_bytes(partial) < size_bytes:
            self._persist(ask, lambda: _size_bytes(partial))

    @contextmanager
    def _answer(self, path: str, what: str, **options: Any) -> Iterator[httpx.Response]:
        """Raises httpx.HTTPError where it can help to ask again, else WeightsError for what is no success."""
        with self._client.stream("GET", path, **options) as response:
            status = response.status_code
            if status in {408, 429} or status >= 500:
                response.raise_for_status()
            if status in {401, 403}:
                raise _error(
                    f"{what}: refused ({status}); there is no such name, or HF_TOKEN has to be one that may read it"
                )
            if status != 416 and not response.is_success:
                raise _error(f"{what}: not there ({status}); correct the name or the revision in the preset")
            yield response

    def _persist(self, ask: Callable[[], T], arrived: Callable[[], int] = lambda: 0) -> T:
        """Asks until it succeeds, or until nothing more has arrived in as many tries as there are pauses."""
        pauses = iter(self._pauses_s)
        while True:
            before = arrived()
            try:
                return ask()
            except httpx.HTTPError as error:
                if arrived() > before:
                    pauses = iter(self._pauses_s)
                pause_s = next(pauses, None)
                if pause_s is None:
                    raise _error(
                        f"{self._client.base_url.host} could not be reached ({_reason(error)}): "
                        "run the same command again, it continues where it stopped"
                    ) from None
                time.sleep(pause_s)


# Errors


def _reason(error: httpx.HTTPError) -> str:
    """Without addresses and headers, which may hold credentials."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP {error.response.status_code}"
    return str(error) if isinstance(error, httpx.ConnectError) else type(error).__name__


def _error(message: str) -> WeightsError:
    return WeightsError(one_line(message, MAX_MESSAGE_CHARS))


@contextmanager
def _mapped(weights_dir: Path) -> Iterator[None]:
    """What the file system says, as errors of ours."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(
                f"no room is left in {weights_dir}: free some and run the same command again, it continues where it "
                "stopped"
            ) from None
        raise _error(f"{error.filename or weights_dir}: {error.strerror or error}") from None
