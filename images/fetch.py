"""Fetches the weights of a preset in the build of an image: `python fetch.py PRESET FOLDER`.

Weights are layers of tens of gigabytes, and a builder makes them anew when any file changes that it was given before.
So this imports the few modules that weights depend on and nothing else of ours, and reads no setting;
`runpod.Dockerfile` names those modules.
"""

import argparse
import math
import sys
from pathlib import Path

import structlog

from inference.engines.wan import fetching
from inference.engines.wan.hub import ENDPOINT
from inference.engines.wan.presets import PRESETS
from inference.errors import I2VError
from inference.progress.files import FileProgress

log = structlog.get_logger(__name__)


class Lines:
    """Prints a line for each file as it begins, for the log of a build."""

    def __init__(self) -> None:
        self._shown = 0

    def __call__(self, progress: FileProgress) -> None:
        """Called with the progress of every file."""
        if progress.number != self._shown:
            self._shown = progress.number
            number, size_gb = f"{progress.number} of {progress.count}", round(progress.size_bytes / 1e9, 2)
            log.info("fetching", repository=progress.repository, file=progress.path, number=number, size_gb=size_gb)


def main() -> None:
    """Fetches and verifies weights. Presets that are built and not fetched are left to `bake.py build`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", choices=[*PRESETS])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--accept-non-commercial", choices=["true", "false"], default="false")
    parser.add_argument("--token-file", type=Path, help="token of huggingface.co; public weights need none")
    parser.add_argument("--at-most-gb", type=float, default=math.inf, help="stop before more is there, for one layer")
    parser.add_argument("--endpoint", default=ENDPOINT, help="a mirror of huggingface.co")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    preset = PRESETS[given.preset]
    if preset.built_here:
        return
    there = given.token_file is not None and given.token_file.is_file()  # a build without the secret has no such file
    try:
        fetching.fetch(
            preset,
            given.folder,
            sink=Lines(),
            endpoint=given.endpoint,
            token=given.token_file.read_text().strip() if there else None,
            accept_non_commercial=given.accept_non_commercial == "true",
            at_most_bytes=given.at_most_gb * 1e9,
        )
    except I2VError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
