"""Files and folders that nobody else on this machine may read: photos of families, payments, keys that sign, logs.

Whatever the umask says. What an earlier version left open is closed, where it is this user's and surely ours.
"""

import os
import stat
import sys
from fnmatch import fnmatch
from pathlib import Path

OTHERS = stat.S_IRWXG | stat.S_IRWXO


def make_folder(path: Path, *ours: str) -> None:
    """Makes a folder for this user alone. Raises OSError.

    One that is there is closed if nothing lies in it but `ours` (patterns of names): somebody may have named a folder
    that holds other things, too, and that others have to read.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if ours and all(any(fnmatch(name, pattern) for pattern in ours) for name in os.listdir(path)):  # noqa: PTH208 - names
        close(path)


def make_file(path: Path) -> None:
    """Makes an empty file for this user alone, or closes the one that is there. Raises OSError."""
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT, 0o600))
    close(path)


def close(path: Path) -> None:
    """Takes all rights of others away. Links, what belongs to others, and folders that all share stay as they are."""
    if sys.platform == "win32":  # where rights are no bits, and a user's folders are private by themselves
        return
    try:
        status = path.lstat()
        mode = stat.S_IMODE(status.st_mode)
        is_ours = status.st_uid == os.geteuid() and not stat.S_ISLNK(status.st_mode) and not mode & stat.S_ISVTX
        if is_ours and mode & OTHERS:
            path.chmod(mode & ~OTHERS)
    except FileNotFoundError:
        pass
