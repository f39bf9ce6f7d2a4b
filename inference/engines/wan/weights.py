"""Weights on disk: where they are, what they should contain, and checks whether they do.

    <weights_dir>/Wan-AI--Wan2.2-I2V-A14B-Diffusers/
        transformer/…           files under the paths they have in their repository
        weights.lock.json       the revision; of each file what was published, and what lies here
        .partial/<digest>       what is still arriving; the next fetch goes on from there

Nothing here imports torch: an engine calls `require` and `read_ahead` before it does.
"""

import hashlib
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, ValidationError

from inference.engines.wan.presets import Component, Lora, Preset, Repository
from inference.errors import NO_ROOM_ERRNOS, DiskFull, WeightsError, one_line
from inference.progress.files import FileProgress, Step

LOCK = "weights.lock.json"
TENSORS = ".safetensors"
INDEX = ".safetensors.index.json"

READ_AHEAD_BYTES = 64 * 1024 * 1024
"""Bytes per read. 2 GB from a cold disk beside a busy interpreter take 1.4 s, but 10.4 s with reads of 1 MiB, because
each return waits for the interpreter's lock. posix_fadvise(WILLNEED) reads only 8 MB of a file, and in 1 MiB calls
waits, too."""
READ_AHEAD_SHARE = 0.75
"""The share of the available memory to fill: reading more would evict what was read before."""
MEMINFO = Path("/proc/meminfo")

CHUNK_BYTES = 1024 * 1024  # per read, where content is hashed
MAX_MESSAGE_CHARS = 500

Sink = Callable[[FileProgress], None]
Report = Callable[[Step, int], None]  # the step, and its done_bytes


def reporter(sink: Sink | None, progress: FileProgress) -> Report:
    """Tells a sink, where there is one, how far the file of `progress` is."""
    return lambda step, done_bytes: sink(replace(progress, step=step, done_bytes=done_bytes)) if sink else None


Digest = Annotated[str, Field(pattern="^([0-9a-f]{64}|[0-9a-f]{40})$")]
"""The hub's name for content: of an LFS file its sha256, of any other git's sha1. Here it names files, too."""


class Entry(BaseModel):
    """One file, as it was published and as it lies here."""

    published_digest: Digest
    published_bytes: Annotated[int, Field(ge=0)]
    sha256: str | None = None  # None until it is here
    size_bytes: int | None = None

    def is_whole(self, path: Path) -> bool:
        """Whether it lies at `path`, by its size. Raises OSError."""
        return path.is_file() and path.stat().st_size == self.size_bytes


class Lock(BaseModel):
    """What a repository's folder holds, or will when the fetch is through."""

    repository: str
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
    files: dict[str, Entry]  # by their paths

    @classmethod
    def read(cls, repository: Repository, folder: Path) -> Self | None:
        """None where there is none. Raises WeightsError for a damaged one or another revision's, OSError."""
        try:
            lock = cls.model_validate_json((folder / LOCK).read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            raise weights_error(f"{folder / LOCK} is damaged: remove {folder}") from None
        if repository.revision not in {None, lock.revision}:
            raise weights_error(
                f"{folder} holds revision {lock.revision}, not the pinned {repository.revision}: remove it"
            )
        return lock

    def save(self, folder: Path) -> None:
        """In one step. Raises OSError."""
        new = folder / f".{LOCK}.new"
        new.write_text(json.dumps(self.model_dump(), indent=2, sort_keys=True) + "\n")
        new.replace(folder / LOCK)


# Whether the weights are complete


def folder_of(weights_dir: Path, repository: Repository) -> Path:
    """Where the files of a repository lie."""
    return weights_dir / repository.folder


def check(preset: Preset, weights_dir: Path, *, thorough: bool = True, sink: Sink | None = None) -> list[str]:
    """What is wrong with the weights of a preset, a line each; nothing if all is well.

    `thorough` reads every byte; without it, names and sizes are compared. Raises WeightsError for what it may not read.
    """
    with mapped(weights_dir):
        return list(dict.fromkeys(_problems(preset, weights_dir, thorough=thorough, sink=sink)))


def require(preset: Preset, weights_dir: Path) -> None:
    """Compares names and sizes, in milliseconds. Raises WeightsError with the first problem and its remedy."""
    with mapped(weights_dir):
        if problem := next(_problems(preset, weights_dir), None):
            way_out = _way_out(preset)
            raise weights_error(problem if problem.endswith(way_out) else f"{problem}; {way_out}")


def weight_files(preset: Preset, weights_dir: Path) -> list[Path]:
    """The safetensors files of a preset, in the order of its parts."""
    found: list[Path] = []
    for part in parts_of(preset):
        path = folder_of(weights_dir, part.repository) / part.path
        found += sorted(path.glob(f"*{TENSORS}")) if isinstance(part, Component) else [path]
    return found


def read_ahead(paths: Iterable[Path]) -> threading.Thread:
    """Has files read into the operating system's cache while something else goes on, such as importing torch.

    Returns at once and raises nothing. The thread ends with the last byte, or where memory would not hold more.
    """

    def read(paths: list[Path], limit_bytes: float) -> None:
        buffer = bytearray(READ_AHEAD_BYTES)
        read_bytes = 0
        for path in paths:
            if read_bytes > limit_bytes:
                return
            with suppress(OSError), path.open("rb", buffering=0) as file:
                while read_bytes <= limit_bytes and (count := file.readinto(buffer)):
                    read_bytes += count

    arguments = (list(paths), _available_bytes() * READ_AHEAD_SHARE)
    thread = threading.Thread(target=read, args=arguments, name="read-ahead", daemon=True)
    thread.start()
    return thread


def _available_bytes() -> float:
    """What new work could have without swapping, as Linux estimates it; infinite where nothing says."""
    with suppress(OSError):
        if found := re.search(rb"^MemAvailable:\s*(\d+) kB", MEMINFO.read_bytes(), re.MULTILINE):
            return int(found[1]) * 1024
    return math.inf


# What should be there


def parts_of(preset: Preset, repository: Repository | None = None) -> list[Component | Lora]:
    """The parts of a preset; with a repository, those it takes from there."""
    parts: list[Component | Lora] = [*preset.components.values(), *preset.loras]
    return [part for part in parts if repository in {None, part.repository}]


def covers(part: Component | Lora, path: str) -> bool:
    """Whether a path in its repository belongs to a part."""
    return path == part.path or path.startswith(f"{part.path}/")


def read_index(path: Path) -> dict[str, Any]:
    """Which tensor is in which shard. Raises WeightsError, OSError."""
    with suppress(ValueError):
        index = json.loads(path.read_bytes())
        if isinstance(index, dict) and isinstance(index.get("weight_map"), dict):
            return index
    raise weights_error(f"{path} is damaged: remove it")


def shards_of(index: dict[str, Any]) -> list[str]:
    """The names of the files that an index speaks of."""
    return sorted({str(shard) for shard in index["weight_map"].values()})


def _way_out(preset: Preset) -> str:
    return f"run: i2v weights fetch {preset.name}"


def _problems(preset: Preset, weights_dir: Path, *, thorough: bool = False, sink: Sink | None = None) -> Iterator[str]:
    there = [it for it in preset.repositories if _exists(folder_of(weights_dir, it))]
    absent = [folder_of(weights_dir, it) for it in preset.repositories if it not in there]
    for folder in absent if there else [weights_dir]:
        yield f"there are no weights of {preset.name} in {folder}: {_way_out(preset)}"
    for repository in there:
        if not repository.built_here:
            folder, parts = folder_of(weights_dir, repository), parts_of(preset, repository)
            yield from _differences(repository, folder, parts, sink, thorough=thorough)
    yield from _unloadable(preset, there, weights_dir)


def _exists(folder: Path) -> bool:
    """Unlike Path.exists, raises OSError for a folder that cannot be accessed."""
    with suppress(FileNotFoundError):
        return bool(folder.stat())
    return False


def _differences(
    repository: Repository, folder: Path, parts: list[Component | Lora], sink: Sink | None, *, thorough: bool
) -> Iterator[str]:
    """Between what the lock says of these parts and what lies there."""
    try:
        lock = Lock.read(repository, folder)
    except WeightsError as error:
        yield str(error)
        return
    if lock is None:
        yield f"{folder / LOCK} is missing"
        return
    entries = {path: lock.files[path] for path in sorted(lock.files) if any(covers(part, path) for part in parts)}
    for number, (name, entry) in enumerate(entries.items(), 1):
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing"
        elif not entry.is_whole(path):
            yield f"{path} is not whole"
        elif thorough:
            progress = FileProgress(lock.repository, name, entry.size_bytes or 0, number, len(entries))
            if sha256(path, reporter(sink, progress)) != entry.sha256:
                yield f"{path} is damaged: remove it"


def _unloadable(preset: Preset, repositories: list[Repository], weights_dir: Path) -> Iterator[str]:
    """Problems that would make loading fail, also in files that no lock lists."""
    needed = [folder_of(weights_dir, it.repository) / it.path for it in preset.loras if it.repository in repositories]
    for name, component in preset.components.items():
        if component.repository not in repositories:
            continue
        folder = folder_of(weights_dir, component.repository) / component.path
        if name == "tokenizer":
            needed.append(folder / "tokenizer.json")
            continue
        needed.append(folder / "config.json")
        indexes = list(folder.glob(f"*{INDEX}"))
        if not indexes and not any(folder.glob(f"*{TENSORS}")):
            needed.append(folder / f"*{TENSORS}")
        for index in indexes:
            try:
                needed += [folder / shard for shard in shards_of(read_index(index))]
            except WeightsError as error:
                yield str(error)
    yield from (f"{path} is missing" for path in needed if not path.is_file())


# Content


def bytes_at(path: Path) -> int:
    """The size of a file; 0 where there is none. Raises OSError."""
    return path.stat().st_size if path.exists() else 0


def sha256(path: Path, report: Report | None = None) -> str:
    """As LFS names content. Raises OSError."""
    return _digest(hashlib.sha256(), path, report)


def git_sha1(path: Path, report: Report | None = None) -> str:
    """As git names a blob. Raises OSError."""
    return _digest(hashlib.sha1(b"blob %d\0" % bytes_at(path), usedforsecurity=False), path, report)


def _digest(digest: Any, path: Path, report: Report | None) -> str:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if report:
                report("verify", file.tell())
    return str(digest.hexdigest())


# Errors


def weights_error(message: str) -> WeightsError:
    """A WeightsError with a message of one line."""
    return WeightsError(one_line(message, MAX_MESSAGE_CHARS))


@contextmanager
def mapped(weights_dir: Path) -> Iterator[None]:
    """Maps the OSErrors of the block. Raises WeightsError, DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM_ERRNOS:
            raise DiskFull(
                f"no room is left in {weights_dir}: free some and run the same command again, it continues where it "
                "stopped"
            ) from None
        raise weights_error(f"{error.filename or weights_dir}: {error.strerror or error}") from None
