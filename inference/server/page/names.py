"""Names of photos and clips, as they are shown and as files are called on other people's computers."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

MAX_NAME_BYTES = 120
"""Of a file's name without its number and extension: file systems allow 255 bytes, and some archivers fewer."""

# Not allowed on Windows (learn.microsoft.com/windows/win32/fileio/naming-a-file), or with a meaning in a path.
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]')
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


# Direction of writing turned around, invisible characters, halves of characters. Not U+200D, which joins emoji.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def shown_name(filename: str | None, storage_path: str) -> str:
    """What a photo is called on the page: as whoever uploaded it called it, or else as it is stored.

    macOS sends Hangul in pieces, which some fonts show as such; so it is composed (NFC). It writes the time of a
    screenshot with a narrow space of its own, which becomes an ordinary one.
    """
    name = " ".join(_UNSEEN.sub("", unicodedata.normalize("NFC", filename or "")).split())
    return name or PurePosixPath(storage_path).name


def clip_name(photo_name: str, video_path: str) -> str:
    """The file name of a clip: its photo's, made safe, with the extension of the video.

    >>> clip_name("../가족: 여름.heic", "videos/1.mp4")
    '가족_ 여름.mp4'
    """
    stem = PurePosixPath(photo_name.replace("\\", "/")).stem
    return f"{safe(stem) or 'clip'}{PurePosixPath(video_path).suffix.lower() or '.mp4'}"


def safe(text: str) -> str:
    """A text as (part of) the name of a file on any system; may be empty."""
    text = _FORBIDDEN.sub("_", unicodedata.normalize("NFC", text)).strip(" .")
    text = text.encode("utf-8", "replace")[:MAX_NAME_BYTES].decode("utf-8", "ignore").strip(" .")
    return f"_{text}" if _RESERVED.fullmatch(text) else text


def unique(names: Iterable[str]) -> Iterator[str]:
    """The same names, each once: what came before in capital or small letters gets a number.

    >>> list(unique(["a.mp4", "A.mp4"]))
    ['a.mp4', 'A (2).mp4']
    """
    taken: set[str] = set()
    for name in names:
        path, number, free = PurePosixPath(name), 1, name
        while free.casefold() in taken:
            number += 1
            free = f"{path.stem} ({number}){path.suffix}"
        taken.add(free.casefold())
        yield free
