"""What a run made: which files, and which of them is the video.

Core savers list their files under `images` (SaveVideo and SaveWEBM as well, with `"animated": [true]`), widely used
nodes under `gifs` or `videos`; `type` is `output`, or `temp` for previews, which ComfyUI deletes when it starts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from inference.errors import InvalidRequest, one_line

MAX_NAME_CHARS = 80
"""How much of a name messages show."""

# The better a format plays as it is, the higher; other containers of real video lie between.
RANKS = {".mp4": 3, ".m4v": 3, ".webm": 2, ".mov": 2, ".mkv": 2, ".gif": 1}
PICTURES_THAT_MOVE = (".webp", ".png", ".apng")
"""Formats of still and of moving pictures: a file of these is a video only where its node says that it is animated."""

NOT_STILL = ("gifs", "videos", "video")
"""Lists in which a picture moves, whatever `animated` says."""


@dataclass(frozen=True)
class Output:
    """One file that a run made."""

    node: str
    filename: str
    subfolder: str
    kind: str  # output or temp
    moves: bool  # its node says so, where its format leaves it open

    @property
    def called(self) -> str:
        """Its name for people. A workflow may put anything there."""
        return one_line(self.filename, MAX_NAME_CHARS)

    @property
    def rank(self) -> int:
        """How well it serves as the video; 0 for what is none."""
        suffix = PurePosixPath(self.filename).suffix.lower()
        return RANKS.get(suffix, 1 if self.moves and suffix in PICTURES_THAT_MOVE else 0)


def listed(outputs: object) -> list[Output]:
    """Every file in the outputs of a history, in the order in which nodes ended; what is no file is left out."""
    found: dict[Output, None] = {}
    for node, output in outputs.items() if isinstance(outputs, dict) else []:
        if not isinstance(output, dict):
            continue
        animated = output.get("animated")
        flagged = True in animated if isinstance(animated, list) else animated is True
        for key, files in output.items():
            for file in files if isinstance(files, list) else [files]:
                if isinstance(file, Mapping) and isinstance(file.get("filename"), str) and file["filename"]:
                    subfolder, kind = str(file.get("subfolder") or ""), str(file.get("type") or "output")
                    found[Output(node, file["filename"], subfolder, kind, flagged or key in NOT_STILL)] = None
    return list(found)


def chosen(files: list[Output]) -> tuple[Output, list[Output]]:
    """The video, and the other files that were saved.

    It is the last one of the best format: where a workflow saves one clip as it was made and another with more frames
    or pixels, the latter needs the former and so ends later. Raises InvalidRequest where there is none.
    """
    saved = [file for file in files if file.kind != "temp"]
    video = max(reversed(saved), key=lambda file: file.rank, default=None)
    if video is None or video.rank == 0:
        made = f"it made {len(saved)} image{'' if len(saved) == 1 else 's'}" if saved else "no file at all"
        if any(file.rank and file.kind == "temp" for file in files):
            made = "only a preview of one; set save_output of the node that combines it"
        raise InvalidRequest(f"workflow: it made no video ({made})")
    return video, [file for file in saved if file is not video]
