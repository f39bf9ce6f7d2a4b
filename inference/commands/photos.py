"""Photos, and the prompt behind them, as they are typed."""

import shlex
import stat
from collections.abc import Sequence
from pathlib import Path

from inference.errors import SettingsError

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".heic", ".heif", ".hif"}
"""A word that ends so is meant as the name of a photo."""


def photos_and_prompt(command: str, words: Sequence[str], *, prompted: bool) -> tuple[list[Path], str]:
    """Which words are photos: all but the last, which is the prompt unless it is called like a photo.

    With `--prompt`, which `prompted` tells, all words are photos. `command` is for the example in an error.
    Raises SettingsError for a photo that is not there, and for a last word that may be meant as either.
    """
    photos, prompt = list(words), ""
    if not prompted and len(photos) > 1 and Path(photos[-1]).suffix.lower() not in PHOTO_SUFFIXES:
        prompt = photos.pop()
        if mode := _mode_of(prompt):
            kind = "folder" if stat.S_ISDIR(mode) else "file"
            raise SettingsError(f"{prompt} is a {kind}, and the last word is the prompt: give that with --prompt")
    problems, is_text = [], False
    for photo in photos:
        mode = _mode_of(photo)
        if stat.S_ISDIR(mode):
            problems.append(f"{photo} is a folder: give the photos in it, as in {shlex.quote(photo.rstrip('/'))}/*.jpg")
        elif not stat.S_ISREG(mode):
            problems.append(f"there is no file {photo}")
            is_text |= Path(photo).suffix.lower() not in PHOTO_SUFFIXES
    if is_text:
        problems.append(f'photos come first, then the prompt in quotes: i2v {command} photo.jpg "pan left"')
    if problems:
        raise SettingsError("\n".join(problems))
    return [Path(photo) for photo in photos], prompt


def _mode_of(word: str) -> int:
    """What kind of file a word names, 0 for none. `Path.is_file` raises for a prompt that is too long for a name."""
    try:
        return Path(word).stat().st_mode
    except OSError:
        return 0
