"""Where clips go: a file or a folder, tried before anything is spent on them."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.errors import NO_ROOM_ERRNOS, SettingsError, write_error
from inference.server.page.names import clip_name, unique


@dataclass(frozen=True, slots=True)
class Output:
    """Where clips go: the file of the only one, or a folder."""

    given: str  # as it was typed
    path: Path
    is_folder: bool

    @classmethod
    def of(cls, given: str, count: int | None) -> "Output":
        """What `--output` means for so many clips; None for any number. A folder is made with its first clip.

        Raises SettingsError, DiskFull, NotWritable.
        """
        path = Path(given)
        names_folder = given.endswith(os.sep) or os.path.isdir(path)  # noqa: PTH112 - as in `check_mp4`
        if not names_folder and count == 1:
            check_mp4(path)
            return cls(given, path.absolute(), is_folder=False)
        if not names_folder and path.suffix:
            raise SettingsError(f"--output takes one video where it names a file: for more, give a folder, not {given}")
        path = path.absolute()
        if os.path.isfile(path):  # noqa: PTH113
            raise SettingsError(f"--output: {path} is a file, and no folder")
        if not path.parent.is_dir():
            raise SettingsError(f"--output: there is no folder {path.parent}")
        _require_writable(path / "clip.mp4" if os.path.isdir(path) else path)  # noqa: PTH112
        return cls(given, path, is_folder=True)

    def paths(self, tasks: Sequence[Mapping[str, Any]]) -> dict[str, Path]:
        """Where the clip of each task goes, by its id: named after its photo, and no two alike."""
        if not self.is_folder:
            return {task["id"]: self.path for task in tasks}
        names = unique(clip_name(task.get("photo_filename") or task["id"], ".mp4") for task in tasks)
        return {task["id"]: self.path / name for task, name in zip(tasks, names, strict=True)}


def check_mp4(output: Path) -> None:
    """Tries whether a video can be written to `output`, before anything is spent on one; leaves no trace.

    Raises SettingsError, DiskFull, NotWritable.
    """
    if output.suffix.lower() != ".mp4":
        raise SettingsError(f"--output: {output} has to end in .mp4")
    if os.path.isdir(output):  # noqa: PTH112 - of a name that is too long, Path.is_dir raises
        raise SettingsError(f"--output: {output} is a folder")
    if not output.absolute().parent.is_dir():
        raise SettingsError(f"--output: there is no folder {output.absolute().parent}")
    _require_writable(output)


ROOM_BYTES = 1_000_000
"""Where there is no room for so much, there is none for a clip: a short one of the preview has about as much."""


def _require_writable(output: Path) -> None:
    """Tries the folder of a file that is to be. Raises DiskFull, NotWritable."""
    try:
        output.exists()  # raises where its name is too long
        with tempfile.TemporaryFile(dir=output.absolute().parent) as file:
            file.write(bytes(ROOM_BYTES))
    except OSError as error:
        raise write_error(error, f"--output: {output.absolute()} cannot be written: {_reason_of(error)}") from None


def _reason_of(error: OSError) -> str:
    """In the words of the operating system, but for a full disk."""
    if error.errno in NO_ROOM_ERRNOS:
        return "there is no room left on this machine's disk"
    return (error.strerror or "for no reason that is known").lower()


def temporary_folder(prefix: str, parent: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """A folder for the length of a block. Raises DiskFull, NotWritable."""
    try:
        return tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise write_error(error, f"{parent or 'the temporary folder'} cannot be written: {error.strerror}") from None
