"""One video without a queue: somebody brings a photo, and takes the video away.

commands/render.py         a file to a file
on_modal/container.py      bytes to bytes
on_runpod/direct.py        a URL or base64 to a URL or base64
"""

import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from inference import inputs as files
from inference.engines.base import Job
from inference.engines.turns import EngineTurns
from inference.leasing.retry import Policy, repeat
from inference.payments.ledger import digest
from inference.task import GenerationRequest, Video

ONE_TRY = Policy(attempts=1)
"""For a person who waits: what failed is told at once, and may be asked for again."""


@asynccontextmanager
async def generated(
    turns: EngineTurns,
    request: GenerationRequest,
    inputs: Mapping[str, Path],
    folder: Path,
    job: Job,
    *,
    policy: Policy = ONE_TRY,
    check: Callable[[], None] | None = None,
) -> AsyncIterator[Video]:
    """One video in `folder`, in turn with whoever else uses the engine; the block takes it to where it belongs.

    `check` is asked when the turn has come: what a request needs may have run out while it waited. A payment counts as
    delivered when the block has ended well; until then whoever asks the same again goes on with what was paid for.
    Raises InvalidPhoto, what `check` raises, and as EngineTurns.generate.
    """
    for path in inputs.values():
        await files.verify(path, "image")
    job.report("wait")
    async with turns.taken():
        if check is not None:
            check()
        video = await repeat(lambda: turns.generate(request, inputs, folder, job), policy)
    yield video
    if job.purchase is not None:
        await job.purchase.end("delivered")


def name_of(request: GenerationRequest, photo: bytes) -> str:
    """What the books know a direct request by: the same for the same photo and wishes."""
    wishes = request.model_dump(mode="json", exclude_none=True, exclude={"node_weights", "video_formats"})
    return digest(photo=hashlib.sha256(photo).hexdigest(), **wishes)
