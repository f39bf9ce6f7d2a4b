"""Photos and videos in a folder, and the signed tokens that give access to one of them without a key."""

import base64
import fcntl
import hmac
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EDQUOT, ENOSPC
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Literal

from inference import private
from inference.errors import (
    BadSignature,
    DiskFull,
    I2VError,
    ObjectExists,
    ObjectMissing,
    StorageRefused,
    StorageUnavailable,
    UrlExpired,
)

Operation = Literal["download", "upload"]

INCOMING = ".incoming"
"""The folder of unfinished uploads. It lies beside the objects, because a link needs the same filesystem."""

STALE_S = 24 * 3600
"""No upload takes this long: an older file in INCOMING was left by a process that was killed."""

UNLOCKED_S = 60
"""A file in INCOMING that is this old and not locked was left by a killed process, too: a writer locks its file, and
the lock ends with the process."""

PLACING_TRIES = 3
"""Another process may remove a new folder, because it is empty, before the first object is linked into it."""

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@=+-]{0,199}")
"""One segment of a storage path. Names that begin with a dot are for internal files."""


class Signer:
    """Makes and checks tokens. Each allows one operation on one path until it expires."""

    def __init__(self, secret: str, clock: Callable[[], float] = time.time) -> None:
        self._key = secret.encode()
        self._clock = clock

    def sign(self, operation: Operation, path: str, lifetime_s: float) -> str:
        """A token that is valid for `lifetime_s` from now."""
        claims = {"op": operation, "path": path, "exp": int(self._clock() + lifetime_s)}
        payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode()
        return f"{payload}.{self._mac(payload)}"

    def check(self, token: str, operation: Operation, path: str) -> None:
        """Raises UrlExpired, BadSignature, or StorageRefused for what is no token at all."""
        payload, dot, mac = token.partition(".")
        if not dot or not payload.isascii():
            raise StorageRefused("the token is malformed")
        # As bytes, since compare_digest refuses text that is not ASCII, and the token may be anything.
        if not hmac.compare_digest(mac.encode("utf-8", "surrogatepass"), self._mac(payload).encode()):
            raise BadSignature("the signature does not match")
        claims = json.loads(base64.urlsafe_b64decode(payload))
        if (claims["op"], claims["path"]) != (operation, path):
            raise BadSignature("the token is for something else")
        if claims["exp"] <= self._clock():
            raise UrlExpired('"exp" claim timestamp check failed')

    def _mac(self, payload: str) -> str:
        return hmac.new(self._key, payload.encode(), "sha256").hexdigest()


class ObjectStore:
    """Objects as files, each written once, completely, and never over another one.

    Raises, from any method: DiskFull, StorageUnavailable for other disk errors.
    """

    def __init__(self, folder: Path) -> None:
        with _mapped():
            folder.mkdir(parents=True, exist_ok=True)
            private.close(folder)  # which also protects everything inside
            self._folder = folder.resolve()
            self._incoming = self._folder / INCOMING
            self._incoming.mkdir(exist_ok=True)

    def check(self) -> None:
        """Raises where no object can be written."""
        with self.incoming() as file:
            file.write(b"i2v")
            file.flush()

    def path(self, name: str) -> Path:
        """The file of an object that exists. Raises ObjectMissing."""
        with _mapped():
            file = self._locate(name)
            if file is None or not file.is_file():
                raise ObjectMissing(f"no object {name}")
            return file

    def exists(self, name: str) -> bool:
        """Whether there is an object of that name."""
        with _mapped():
            file = self._locate(name)
            return file is not None and file.is_file()

    def names(self, folder: str) -> Iterator[str]:
        """The names of the objects in a folder, in no particular order."""
        with _mapped(), suppress(FileNotFoundError, NotADirectoryError):
            for entry in (self._folder / folder).iterdir():
                yield f"{folder}/{entry.name}"

    def accepts(self, name: str) -> bool:
        """Whether an object may have that name."""
        with _mapped():
            return self._locate(name) is not None

    @contextmanager
    def incoming(self, suffix: str = "") -> Iterator[IO[bytes]]:
        """A file to write to, gone afterwards unless `place` gave it a name."""
        with _mapped(), NamedTemporaryFile(dir=self._incoming, suffix=suffix) as file:
            with suppress(OSError):  # some network disks have no locks: files there are removed after STALE_S
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file

    def clear_incoming(self) -> int:
        """Removes unfinished uploads of processes that were killed. Returns how many."""
        with _mapped():
            return sum(_is_left(file) and _unlinked(file) for file in self._incoming.iterdir())

    def place(self, file: IO[bytes], name: str) -> None:
        """Makes an incoming file the object `name`, durably. Raises ObjectExists, StorageRefused."""
        with _mapped():
            target = self._locate(name)
            if target is None:
                raise StorageRefused("an object cannot have this name")
            file.flush()
            os.fsync(file.fileno())
            try:
                _link(file.name, target)
            except FileExistsError:
                raise ObjectExists(f"{name} exists already") from None
            _sync_folder(target.parent)

    def remove(self, name: str) -> None:
        """Removes an object durably, if it exists, and its folder once that is empty."""
        with _mapped():
            file = self._locate(name)
            if file is None or not _unlinked(file):
                return
            _sync_folder(file.parent)
            if file.parent != self._folder:
                with suppress(OSError):  # the folder is not empty
                    file.parent.rmdir()

    def _locate(self, name: str) -> Path | None:
        """The file for an object of that name; None where the name could lead out of the folder."""
        if len(name) > 1000 or not all(_SEGMENT.fullmatch(part) for part in name.split("/")):
            return None
        file = self._folder / name
        # A symbolic link inside the folder could lead out of it although the name is valid.
        return file if file.resolve() == file else None


def copy(source: IO[bytes], target: IO[bytes]) -> None:
    """Copies all of `source`, a mebibyte at a time. Raises DiskFull, StorageUnavailable."""
    with _mapped():
        shutil.copyfileobj(source, target, 1024 * 1024)
        target.flush()


def write(file: IO[bytes], chunk: bytes) -> None:
    """Raises DiskFull, StorageUnavailable."""
    with _mapped():
        file.write(chunk)


def _link(source: str, target: Path) -> None:
    """Unlike a rename, refuses to replace. Raises FileExistsError, and OSError for all else."""
    for tries_left in reversed(range(PLACING_TRIES)):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except FileNotFoundError:
            if not tries_left:
                raise
        else:
            return


def _unlinked(file: Path) -> bool:
    """Removes a file; returns whether it existed."""
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    return True


def _is_left(file: Path) -> bool:
    """Whether an unfinished upload has no writer any more."""
    try:
        with file.open("r+b") as left:  # network disks lock only files that are open for writing
            age_s = time.time() - os.fstat(left.fileno()).st_mtime
            if UNLOCKED_S < age_s <= STALE_S:
                fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return age_s > UNLOCKED_S
    except OSError:  # it has become an object, is locked, or the disk has no locks
        return False


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except I2VError:
        raise
    except OSError as error:
        if error.errno in (ENOSPC, EDQUOT):
            raise DiskFull("the storage is full, try again later") from error
        raise StorageUnavailable(f"the storage cannot be used: {error.strerror}") from error
