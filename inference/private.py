"""Files and folders that only this user may read: photos of families, payments, signing keys, logs.

The permissions do not depend on the umask. Files that an earlier version left readable are closed, where they belong to
this user and are certainly ours.
"""

import os
import stat
import sys
from fnmatch import fnmatch
from pathlib import Path

if sys.platform != "win32":
    import fcntl

OTHERS = stat.S_IRWXG | stat.S_IRWXO


def make_folder(path: Path, *ours: str) -> None:
    """Makes a folder for this user alone. Raises OSError.

    An existing folder is closed only if it holds nothing but files that match the patterns `ours`: a person may have
    named a folder that also holds other things, which other users have to read.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if ours and all(any(fnmatch(name, pattern) for pattern in ours) for name in os.listdir(path)):  # noqa: PTH208 - names
        close(path)


def make_file(path: Path) -> None:
    """Makes an empty file for this user alone, or closes an existing one. Raises OSError."""
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT, 0o600))
    close(path)


def close(path: Path) -> None:
    """Removes the permissions of other users. Links, other users' files and shared folders stay as they are."""
    if sys.platform == "win32":  # Windows has no permission bits, and a user's folders are private by default
        return
    try:
        status = path.lstat()
        mode = stat.S_IMODE(status.st_mode)
        is_ours = status.st_uid == os.geteuid() and not stat.S_ISLNK(status.st_mode) and not mode & stat.S_ISVTX
        if is_ours and mode & OTHERS:
            path.chmod(mode & ~OTHERS)
    except FileNotFoundError:
        pass


def hold(path: Path, *, shared: bool = False) -> int | None:
    """Locks a file or folder for as long as the returned descriptor is open, so until this process ends at the latest.

    None where another process holds the lock, and on Windows, which has no such locks. `shared`: only looks whether
    somebody holds it, without being in the way of others who look. Raises OSError where the file cannot be opened, and
    where its file system has no such locks: NFS refuses them for what is opened to be read.
    """
    if sys.platform == "win32":
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
