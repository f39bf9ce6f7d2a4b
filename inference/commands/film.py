"""`i2v film`: several photos become one film, without a queue."""

import functools
import math
import secrets
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import anyio
import anyio.to_thread
import typer

from inference import process, terminal
from inference.build.engines import engine_note, load_engine, recipe, refuse
from inference.build.workers import build_ledger, build_policy
from inference.commands.outputs import check_mp4, temporary_folder
from inference.commands.photos import photos_and_prompt
from inference.commands.start import OPTIONS, Verbose, start
from inference.engines.turns import EngineTurns
from inference.errors import InvalidPhoto, InvalidRequest
from inference.leasing.film import Film, FilmJob, FolderStore
from inference.leasing.retry import repeat
from inference.media.photo import verify
from inference.payments.ledger import Purchase
from inference.progress.stages import StageTracker
from inference.providers import EngineName, is_paid
from inference.settings import Settings
from inference.task import MAX_FADE_S, MAX_PROMPT_CHARS, MAX_SEGMENTS, GenerationRequest, Segment, asked_as

T = TypeVar("T")

STAGES = {"segments": 95.0, "join": 5.0}
"""What there is to do without a queue, and its share of the whole, in percent."""


def film(  # noqa: PLR0917 - as many arguments as it has options
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="PHOTO",
            help="JPEG, PNG, WebP or HEIC files in the order of the film, then what happens: “pan left”.",
        ),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="What should happen, for each photo; once means for all.")
    ] = None,
    seconds: Annotated[
        list[float] | None,
        typer.Option(
            "--seconds", "-s", help="Length of a segment, 5 unless given: once, or for each.", min=0.5, max=60
        ),
    ] = None,
    fade: Annotated[float, typer.Option(help="Seconds of cross-fade between segments.", min=0, max=MAX_FADE_S)] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the mp4 goes.")] = Path("film.mp4"),
    seed: Annotated[int | None, typer.Option(help="Same seed, same segments.", min=0)] = None,
    engine: Annotated[EngineName | None, typer.Option(help="Instead of I2V_ENGINE.")] = None,
    preset: Annotated[str | None, typer.Option(help="Of the Wan engine, instead of I2V_WAN_PRESET.")] = None,
    negative: Annotated[str | None, typer.Option(help="What should not be seen, where the preset can do that.")] = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="Folder in which finished segments stay, for the next film.", file_okay=False),
    ] = None,
    *,
    verbose: Verbose = False,
) -> None:
    """Photos, no queue: a segment of each, joined into one film, which has the shape of the first photo.

    Finished segments are kept until the film is: interrupted, the same command goes on where it was, and with
    `--engine runway` pays for nothing twice.
    """
    photos, for_all = photos_and_prompt("film", words, prompted=bool(prompt))
    check_mp4(output)
    settings = start("warning", verbose=verbose, engine=engine, wan_preset=preset)
    segments = _segments(photos, prompt or [for_all], seconds or [5.0], fade)
    with asked_as(OPTIONS):
        longest_s = max(segment.duration_s for segment in segments)
        request = GenerationRequest(negative_prompt=negative, duration_s=longest_s, seed=seed)
    for photo, segment in zip(photos, segments, strict=True):
        with asked_as({"duration_s": f"--seconds of {photo.name}"}):
            refuse(settings, request.for_segment(segment))
    process.run(
        lambda: _film(
            settings, photos, segments, request, fade_s=fade, output=output.absolute(), keep=keep and keep.absolute()
        )
    )


def _segments(photos: list[Path], prompts: list[str], seconds: list[float], fade_s: float) -> list[Segment]:
    """One for each photo, which is its input's name, too. Raises InvalidRequest."""
    if len(photos) > MAX_SEGMENTS:
        raise InvalidRequest(f"{len(photos)} photos are given; a film has at most {MAX_SEGMENTS}")
    for name, given in (("--prompt", prompts), ("--seconds", seconds)):
        if len(given) not in {1, len(photos)}:
            raise InvalidRequest(
                f"{name} is given {len(given)} times for {len(photos)} photos: give it once, or once for each"
            )
    if any(len(prompt) > MAX_PROMPT_CHARS for prompt in prompts):
        raise InvalidRequest(f"--prompt: a prompt has at most {MAX_PROMPT_CHARS} characters")
    if len(photos) > 1 and 2 * fade_s > min(seconds):
        raise InvalidRequest(f"--fade: {fade_s:g} s are more than half of the shortest segment ({min(seconds):g} s)")
    if len(prompts) == 1:
        prompts *= len(photos)
    if len(seconds) == 1:
        seconds *= len(photos)
    each = enumerate(zip(prompts, seconds, strict=True), 1)
    return [Segment(photo=f"photo {number}", prompt=prompt, duration_s=length_s) for number, (prompt, length_s) in each]


async def _film(
    settings: Settings,
    photos: Sequence[Path],
    segments: Sequence[Segment],
    request: GenerationRequest,
    *,
    fade_s: float,
    output: Path,
    keep: Path | None,
) -> None:
    await _verify(photos)
    terminal.say(f"The engine is {engine_note(settings)}.")
    turns = EngineTurns(await load_engine(settings), limit_s=math.inf)  # a person sees for how long it has been at it
    store = FolderStore(keep or output.with_name(f".{output.name}.segments"))
    done = 0

    def on_segment(number: int, found: bool) -> None:
        nonlocal done
        done = number
        how = "kept from before" if found else "done"
        terminal.say(f"  {number}/{len(photos)}  {photos[number - 1].name}  {how}")

    async def attempt(operation: Callable[[], Awaitable[T]]) -> T:
        return await repeat(operation, build_policy(settings))

    # Beside the output, on the same filesystem: the finished film appears whole or not at all.
    with temporary_folder(".i2v-", output.parent) as folder, terminal.bar("film") as sink:
        tracker = StageTracker(STAGES, sink)
        making = Film(
            turns,
            segments,
            request,
            {segment.photo: photo for segment, photo in zip(segments, photos, strict=True)},
            Path(folder),
            FilmJob(tracker, len(segments), STAGES),
            attempt,
            fade_s=fade_s,
            recipe=recipe(settings),
            store=store,
            purchase=_purchases(settings),
            on_segment=on_segment,
        )
        try:
            video = await making.made()
            video.path.replace(output)
            tracker.finish()
        except BaseException:
            if done:
                terminal.say(f"{done} of {len(photos)} segments are kept in {store.folder}: the same command goes on.")
            raise
    if keep is None:
        await anyio.to_thread.run_sync(functools.partial(shutil.rmtree, store.folder, ignore_errors=True))
    cost = "" if video.cost_usd is None else f" · ${video.cost_usd:.2f}"
    terminal.say(f"  {terminal.describe(video)}{cost}")
    terminal.say(f"  time  {terminal.times(tracker.stage_seconds())}")
    terminal.result(output)


async def _verify(photos: Sequence[Path]) -> None:
    """Reads every photo before anything is spent on one. Raises InvalidPhoto that says which, MachineFault."""
    for number, photo in enumerate(photos, 1):
        try:
            await anyio.to_thread.run_sync(verify, photo)
        except InvalidPhoto as error:
            raise InvalidPhoto(f"photo {number} of {len(photos)}, {photo.name}: {error}") from None


def _purchases(settings: Settings) -> Callable[[str], Purchase] | None:
    """The ledger entry of each segment, for an engine that is paid by the clip: the same segment has the same entry."""
    if not is_paid(settings.engine):
        return None
    ledger = build_ledger(settings)
    return lambda key: ledger.purchase(f"film.{key}", secrets.token_hex(6))
