"""`i2v render`: one photo through an engine, without a queue."""

import math
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import anyio
import typer

from inference import process, terminal
from inference.build.engines import engine_note, load_engine, refuse
from inference.build.workers import build_ledger
from inference.commands.outputs import check_mp4, temporary_folder
from inference.commands.start import OPTIONS, Photo, Prompt, Seconds, Verbose, start
from inference.engines.base import Job
from inference.engines.turns import EngineTurns
from inference.errors import I2VError, SettingsError
from inference.leasing.direct import generated, name_of
from inference.payments.ledger import Purchase
from inference.progress.stages import StageTracker
from inference.providers import EngineName, is_paid
from inference.settings import Settings
from inference.task import LAST_PHOTO, PHOTO, GenerationRequest, Video, asked_as


def render(  # noqa: PLR0917 - as many arguments as it has options
    photo: Photo,
    prompt: Prompt = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the mp4 goes.")] = Path("out.mp4"),
    seconds: Seconds = 5,
    seed: Annotated[int | None, typer.Option(help="Same seed, same video.", min=0)] = None,
    engine: Annotated[EngineName | None, typer.Option(help="Instead of I2V_ENGINE.")] = None,
    preset: Annotated[str | None, typer.Option(help="Of the Wan engine, instead of I2V_WAN_PRESET.")] = None,
    negative: Annotated[str | None, typer.Option(help="What should not be seen, where the preset can do that.")] = None,
    last: Annotated[
        Path | None, typer.Option(help="A photo to end on, where the preset can do that.", exists=True, dir_okay=False)
    ] = None,
    *,
    verbose: Verbose = False,
) -> None:
    """One photo, no queue: straight through the engine into a file.

    With `--engine runway` it is paid for. Interrupted, the same command goes on with what was paid for already.
    """
    check_mp4(output)
    settings = start("warning", verbose=verbose, engine=engine, wan_preset=preset)
    with asked_as(OPTIONS):
        request = GenerationRequest(prompt=prompt, negative_prompt=negative, duration_s=seconds, seed=seed)
        refuse(settings, request)
    inputs = {PHOTO: photo} if last is None else {PHOTO: photo, LAST_PHOTO: last}
    process.run(lambda: _render(settings, request, inputs, output.absolute()))


async def _render(settings: Settings, request: GenerationRequest, inputs: dict[str, Path], output: Path) -> None:
    terminal.say(f"The engine is {engine_note(settings)}.")
    started = anyio.current_time()
    turns = EngineTurns(await load_engine(settings), limit_s=math.inf)  # a person sees for how long it has been at it
    loaded_s = anyio.current_time() - started
    purchase = await anyio.to_thread.run_sync(_purchase, settings, request, inputs[PHOTO])
    # Beside the output, on the same filesystem: the finished file appears whole or not at all.
    with temporary_folder(".i2v-", output.parent) as folder, terminal.bar("rendering") as sink:
        tracker = StageTracker(turns.stages, sink)
        try:
            async with generated(turns, request, inputs, Path(folder), Job(tracker, purchase)) as video:
                video.path.replace(output)
                tracker.finish()
        except anyio.get_cancelled_exc_class():
            if purchase is not None and await _is_paid(purchase):
                terminal.say("It goes on at Runway: the same command fetches what was paid for.")
            raise
    terminal.say(f"  {terminal.describe(video)}{_notes(video)}")
    seconds = {"load": loaded_s} | tracker.stage_seconds()
    seconds.pop("wait", None)  # nobody else uses this engine
    terminal.say(f"  time  {terminal.times(seconds)}")
    terminal.result(output)


def _purchase(settings: Settings, request: GenerationRequest, photo: Path) -> Purchase | None:
    """The ledger entry, for an engine that is paid by the clip. The same photo and request have the same entry."""
    if not is_paid(settings.engine):
        return None
    try:
        name = f"render-{name_of(request, photo.read_bytes())}"
    except OSError as error:
        raise SettingsError(f"{photo} cannot be read: {error.strerror}") from None
    return build_ledger(settings).purchase(name, secrets.token_hex(6))


async def _is_paid(purchase: Purchase) -> bool:
    is_paid = False
    with anyio.CancelScope(shield=True), suppress(I2VError):
        is_paid = await purchase.is_ours()
    return is_paid


def _notes(video: Video) -> str:
    seed = "" if video.seed is None else f" · seed {video.seed}"
    cost = "" if video.cost_usd is None else f" · ${video.cost_usd:.2f}"
    return seed + cost + (f" · as it came: {video.as_it_came}" if video.as_it_came else "")
