"""One start of the Wan engine as a container makes it, up to its first step; prints its phases as JSON.

`python -m tests.bench.wan` runs it in a process of its own. Nothing is imported up here that a container has not.
"""

import time

ENTERED_AT = time.monotonic()

import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import anyio  # noqa: E402
import structlog  # noqa: E402

from inference.build.engines import build_engine  # noqa: E402
from inference.engines.base import Job  # noqa: E402
from inference.errors import CancelRequested  # noqa: E402
from inference.progress.stages import Progress, StageTracker  # noqa: E402
from inference.settings import Settings  # noqa: E402
from inference.task import GenerationRequest  # noqa: E402


def main() -> None:
    """Builds the engine that the settings name, and cancels its first clip after one step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights-dir", type=Path)
    parser.add_argument("--preset")
    parser.add_argument("--photo", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--request", help="a GenerationRequest as JSON")
    parser.add_argument("--spawned-at", type=float, help="monotonic time at which the process was started")
    asked = parser.parse_args()
    marks = {"python": ENTERED_AT, "runner": time.monotonic()}

    def note(_logger: object, _method: str, event: dict[str, Any]) -> dict[str, Any]:
        if event["event"] == "loaded":
            marks.setdefault("torch and diffusers", time.monotonic() - event["seconds"])
            marks[event["component"]] = time.monotonic()
        raise structlog.DropEvent

    structlog.configure(processors=[note])
    engine = build_engine(Settings.isolated(engine="wan", wan_preset=asked.preset, weights_dir=asked.weights_dir))
    marks["ready"] = time.monotonic()

    def follow(progress: Progress) -> None:
        if progress.stage != "denoise":
            return
        torch = sys.modules["torch"]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks["first step" if progress.done else "text and photo"] = time.monotonic()
        if progress.done:
            job.cancel(CancelRequested("it has begun"))

    job = Job(StageTracker(engine.stages, follow))
    try:
        anyio.run(
            engine.generate,
            GenerationRequest.model_validate_json(asked.request),
            {"photo": asked.photo},
            asked.folder,
            job,
        )
    except CancelRequested:
        phases, before = {}, asked.spawned_at
        for name, at in marks.items():
            phases[name], before = at - before, at
        print(json.dumps(phases | {"to the first step": before - asked.spawned_at}))


if __name__ == "__main__":
    main()
