"""Progress of fetching files, apart from other progress: a change here rebuilds the image layers that hold weights."""

from dataclasses import dataclass
from typing import Literal

Step = Literal["download", "verify", "convert"]


@dataclass(frozen=True)
class FileProgress:
    """How far one file is."""

    repository: str
    path: str  # in its repository
    size_bytes: int  # as published; during a check, as it is on disk
    number: int  # position of this file in the call, from 1
    count: int  # of the files of this call
    step: Step = "download"
    done_bytes: int = 0
