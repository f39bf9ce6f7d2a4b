"""How far files are that are fetched or checked. Alone, for an image's build needs it where there is little else."""

from dataclasses import dataclass
from typing import Literal

Step = Literal["download", "verify", "convert"]


@dataclass(frozen=True)
class FileProgress:
    """How far one file is."""

    repository: str
    path: str  # in its repository
    size_bytes: int  # as published; in a check, of what lies here
    number: int  # of this file, from 1
    count: int  # of the files of this call
    step: Step = "download"
    done_bytes: int = 0
