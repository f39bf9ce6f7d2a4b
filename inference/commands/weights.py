"""`i2v weights …`: what the Wan engine needs on disk, for image builds and rented boxes."""

from typing import Annotated

import typer

from inference import logs, terminal
from inference.build.engines import build_weights, compile_ahead
from inference.commands.layout import MARKUP
from inference.engines.wan import fetching, weights
from inference.engines.wan.presets import PRESETS, Preset
from inference.errors import SettingsError, WeightsError
from inference.settings import Settings

app = typer.Typer(name="weights", help="The weights of the Wan engine.", no_args_is_help=True, rich_markup_mode=MARKUP)

Name = Annotated[str, typer.Argument(metavar="PRESET", help=f"One of {', '.join(PRESETS)}.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show every step, and tracebacks of errors.")]


@app.command(epilog="Example: `I2V_WEIGHTS_DIR=/weights i2v weights fetch a14b-fast`")
def fetch(
    preset: Name,
    endpoint: Annotated[str | None, typer.Option(help="A mirror of huggingface.co.")] = None,
    *,
    accept_non_commercial: Annotated[
        bool, typer.Option("--accept-non-commercial", help="For weights whose licence forbids commercial use.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Fetches what PRESET needs into I2V_WEIGHTS_DIR, at pinned revisions, and verifies it.

    Goes on where an earlier call stopped. `tiny` and `tiny-a14b` are not fetched but built.
    """
    chosen, settings = _start(preset, verbose=verbose)
    if chosen.built_here:
        build_weights(chosen, settings.weights_dir)
        count = 0
    else:
        with terminal.files() as sink:
            count = fetching.fetch(
                chosen,
                settings.weights_dir,
                sink=sink,
                endpoint=endpoint,
                token=settings.hf_token.get_secret_value() if settings.hf_token else None,
                accept_non_commercial=accept_non_commercial,
            )
    terminal.say(f"{preset}: {f'{count} files fetched' if count else 'all there'}, in {settings.weights_dir}")


@app.command(epilog="Example: `i2v weights check a14b-fast`")
def check(
    preset: Name,
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Compare names and sizes, not contents.")] = False,
    verbose: Verbose = False,
) -> None:
    """Compares what PRESET needs with what is in I2V_WEIGHTS_DIR; exits 1 if something is wrong."""
    chosen, settings = _start(preset, verbose=verbose)
    with terminal.files() as sink:
        problems = weights.check(chosen, settings.weights_dir, thorough=not quick, sink=sink)
    if problems:
        if not problems[-1].endswith(way_out := f"i2v weights fetch {preset}"):
            problems.append(f"remove what is damaged, then: {way_out}")
        raise WeightsError("\n".join(problems))
    terminal.say(f"{preset}: all there, in {settings.weights_dir}")


@app.command("compile", epilog="Example: `i2v weights compile a14b-fast`")
def compile_(preset: Name, *, verbose: Verbose = False) -> None:
    """Compiles the transformer of PRESET for this GPU and these settings: minutes, once. Later starts find it.

    It goes to I2V_WAN_COMPILED, or to `compiled` in I2V_WEIGHTS_DIR.
    """
    _, settings = _start(preset, verbose=verbose)
    terminal.say(f"{preset}: this takes minutes")
    folder = compile_ahead(settings.model_copy(update={"engine": "wan", "wan_preset": preset}))
    terminal.say(f"{preset}: compiled for this machine, in {folder}")


def _start(name: str, *, verbose: bool) -> tuple[Preset, Settings]:
    logs.configure("debug" if verbose else "warning")
    if name not in PRESETS:
        raise SettingsError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name], Settings.load()
