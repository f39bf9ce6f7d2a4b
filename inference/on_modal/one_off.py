"""One run that a person asks for: the next task, a given task, or a photo without a queue."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from inference import inputs, terminal
from inference.build import engines
from inference.build.queues import open_queue, open_storage
from inference.errors import EngineError, I2VError, NoTask, SettingsError
from inference.fleet.shape import for_a_cold_start
from inference.leasing.scratch import put, scratch_folder
from inference.leasing.taking import hand_back, lease_from
from inference.on_modal.container import ModalContainer
from inference.on_modal.deployment import on_modal
from inference.payments.records import MemoryRecords
from inference.providers import DEFAULT, EngineName, is_paid
from inference.settings import Settings
from inference.task import GenerationRequest, Lease, Outcome, Video, asked_as

OPTIONS = {"prompt": "--prompt", "duration_s": "--seconds", "seed": "--seed"}
"""What the command line calls the fields of a request."""


def asked(
    photo: str, photo_url: str, prompt: str, seconds: float, seed: int | None, *, item_id: str, saves: bool
) -> dict[str, Any] | None:
    """The request for a person's own photo, as JSON; None for a task of the queue, which has its own.

    Raises SettingsError for options that exclude each other, InvalidRequest naming the field.
    """
    if photo and photo_url:
        raise SettingsError("--photo is a file and --photo-url an address: give one of them")
    if not (photo or photo_url):
        if prompt or seed is not None:
            raise SettingsError("--prompt and --seed go with --photo or --photo-url; a task of the queue has its own")
        return None
    if item_id:
        raise SettingsError("--item-id takes a task of the queue; it has a photo")
    if not saves:
        raise SettingsError("say where the video goes: modal run -w out.mp4 app.py::process …")
    with asked_as(OPTIONS):
        return GenerationRequest(prompt=prompt, duration_s=seconds, seed=seed).model_dump(mode="json")


def photo_bytes(path: str) -> bytes:
    """A photo file's bytes. Raises SettingsError."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"--photo: {path} cannot be read: {error.strerror}") from None


def refuse(settings: Settings, engine: EngineName, request: dict[str, Any] | None) -> None:
    """Raises SettingsError, InvalidRequest for what the engine would refuse, before a container is started."""
    if is_paid(engine) and settings.runway_key is None:
        raise SettingsError(f"the secret {settings.modal_app} has no RUNWAYML_API_SECRET: nothing can go to Runway")
    if request is not None:
        own = settings.model_copy(update={"engine": engine})
        with asked_as(OPTIONS):
            engines.refuse(own, GenerationRequest.model_validate(request))


async def fetch(settings: Settings, photo: bytes | str) -> bytes:
    """A photo's bytes, given or at a URL, verified before a GPU is started.

    Raises StorageError, InvalidPhoto, MachineFault.
    """
    with scratch_folder(settings.temp_dir) as folder:
        path = folder / "photo"
        if isinstance(photo, bytes):
            await anyio.to_thread.run_sync(put, path, photo)
        else:
            async with open_storage(settings) as storage:
                await storage.download(photo, path)
        await inputs.verify(path, "image")
        return path.read_bytes()


@asynccontextmanager
async def taken(settings: Settings, item_id: str) -> AsyncIterator[Lease]:
    """A lease for one run, on the given item or, for an empty id, on the next. Handed back if the block fails.

    Raises NoTask, QueueError, Refusal, InvalidTask.
    """
    async with open_queue(for_a_cold_start(settings, on_modal(settings))) as queue:
        lease = await lease_from(queue, item_id or None)
        if lease is None:
            raise NoTask(f"{item_id} cannot be taken now: see its status" if item_id else "no task waits")
        try:
            yield lease
        except BaseException:  # the container that was to run it may not have received it
            await hand_back(queue, lease)
            raise


async def preview(settings: Settings, lease: Lease | None, request: dict[str, Any] | None, photo: bytes) -> Any:
    """Does what a container would do, in this process, with the preview engine."""
    container = ModalContainer(settings, MemoryRecords())
    await container.open(DEFAULT.pool, "preview", by_hand=True)
    try:
        if lease is not None:
            return await container.run(lease.model_dump(mode="json"), drain=False)
        return await container.render(request or {}, photo)
    finally:
        with anyio.CancelScope(shield=True):
            await container.close()


def lines(answer: list[str] | dict[str, str]) -> list[str]:
    """The lines of a fleet's report. Raises I2VError where it failed or refused."""
    if isinstance(answer, dict):
        raise I2VError(answer["error"])
    return answer


def tell(answer: Any) -> bytes | str:
    """Shows how a run ended; returns the mp4 of one without a queue, else where the queue has it.

    Raises EngineError for one that made no video.
    """
    if isinstance(answer, Mapping) and "error" in answer:
        raise EngineError(str(answer["error"]))
    if isinstance(answer, Mapping):
        terminal.say(f"  {terminal.describe(Video.model_validate(answer['video']))}")
        return bytes(answer["mp4"])
    [outcome] = [Outcome.model_validate(each) for each in answer]
    if outcome.video is None:
        raise EngineError(f"task {outcome.item_id} ended {outcome.status}: {outcome.error}")
    terminal.completed(f"{outcome.item_id}  {terminal.describe(outcome.video)}")
    terminal.say(f"  time       {terminal.times(outcome.stage_seconds)}")
    terminal.say(f"  stored as  {outcome.storage_path or ''}")
    return outcome.storage_path or ""
