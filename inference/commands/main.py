"""`i2v …`: every way to run this on a machine of one's own. What each command does is in its help text.

A command is imported when it is called: `i2v --help`, which names all of them, needs none of what they need.
"""

import importlib
import platform
import sys
from importlib import metadata
from typing import Annotated, Any, NamedTuple

import typer
import typer.core
import typer.main

from inference.commands.layout import HELP, MARKUP

GIVEN: dict[str, Any] = {"rich_markup_mode": MARKUP, "pretty_exceptions_enable": False, "context_settings": HELP}


class Command(NamedTuple):
    """Where a command is, and what the list of commands says of it: the first paragraph of its own help."""

    name: str
    about: str
    module: str  # in `inference.commands`
    attribute: str  # a function, or a Typer with commands of its own
    epilog: str | None = None


COMMANDS = (
    Command(
        "demo",
        "One photo through a real queue over HTTP: no GPU, no account, nothing left behind but the mp4.",
        "demo",
        "demo",
        'Example: `i2v demo holiday.jpg --prompt "pan left"`',
    ),
    Command(
        "up",
        "The queue server with its page and a worker, until Ctrl-C. Data stays in I2V_DATA_DIR.",
        "work",
        "up",
        'Example: `i2v up`, then in another terminal `i2v submit photo.jpg "slow dolly-in" --wait`',
    ),
    Command(
        "serve",
        "The embedded queue server: the documented worker API, and an API for apps, over SQLite or PostgreSQL.",
        "work",
        "serve",
        "Example: `WORKER_API_KEY=… i2v serve --host 0.0.0.0`",
    ),
    Command(
        "work",
        "A plain polling worker for any box: lease, run, repeat.",
        "work",
        "work",
        "Example: `VERCEL_API_URL=https://app.example.com WORKER_API_KEY=… i2v work`",
    ),
    Command(
        "submit",
        "Asks an embedded queue (`i2v up`, `i2v serve`) for videos of photos, all in one group; prints the tasks' ids.",
        "tasks",
        "submit",
        'Example: `i2v submit photo.jpg "pan left" -o out.mp4`, or `i2v submit *.jpg "pan left" -o clips/`',
    ),
    Command(
        "fetch",
        "Downloads videos of completed tasks from an embedded queue.",
        "tasks",
        "fetch",
        "Example: `i2v fetch ID -o out.mp4`, with an ID of `i2v tasks`, or `i2v fetch --group ID -o clips/`",
    ),
    Command(
        "tasks",
        "The tasks of an embedded queue, newest first.",
        "tasks",
        "tasks",
        "Example: `i2v tasks --watch`, or `i2v tasks --status failed`, then `i2v tasks --retry ID`",
    ),
    Command(
        "render",
        "One photo, no queue: straight through the engine into a file.",
        "render",
        "render",
        'Example: `i2v render photo.jpg "천천히 줌인" -o out.mp4`',
    ),
    Command(
        "film",
        "Photos, no queue: a segment of each, joined into one film, which has the shape of the first photo.",
        "film",
        "film",
        'Example: `i2v film a.jpg b.jpg c.jpg "slow dolly-in" --fade 0.5 -o film.mp4`',
    ),
    Command(
        "health",
        "Whether the workers on this box live: exits 0 if the loop of each turned within a minute, else 1.",
        "health",
        "health",
        "Example: `i2v health runway-worker-001`; exits 1 and says which worker hangs",
    ),
    Command(
        "payments",
        "What was paid for at Runway from this machine, oldest first, and what of today's budget is left.",
        "payments",
        "payments",
        "Example: `i2v payments --forget ITEM`, after a look at dev.runwayml.com",
    ),
    Command(
        "doctor",
        "Checks settings, ffmpeg, disk and the queue, or a deployment: one line each; exits 1 if something is wrong.",
        "doctor",
        "doctor",
        "Example: `i2v doctor --url https://app.example.com`, or `i2v doctor modal` before deploying",
    ),
    Command("weights", "The weights of the Wan engine.", "weights", "app"),
    Command("comfy", "The ComfyUI engine: graphs for tasks that bring only a photo.", "comfy", "app"),
    Command(
        "runpod",
        "A RunPod endpoint with a queue: one photo, the tasks of a queue, how its workers are.",
        "runpod",
        "app",
    ),
    Command(
        "push",
        "Serves `POST /jobs/run`: a job of the table `video_jobs` starts when somebody asks for it.",
        "push",
        "app",
    ),
)
"""In the order in which the help names them. A test holds `about` to what each command says of itself."""


def command(name: str) -> Any:
    """A command as click runs it, imported now."""
    [wanted] = (each for each in COMMANDS if each.name == name)
    found = getattr(importlib.import_module(f"inference.commands.{wanted.module}"), wanted.attribute)
    whole = typer.Typer(**GIVEN)
    whole.callback()(lambda: None)  # without it, a group of one command would be that command
    if isinstance(found, typer.Typer):
        whole.add_typer(found)
    else:
        whole.command(name, epilog=wanted.epilog)(found)
    return typer.main.get_group(whole).commands[name]


class Imported(typer.core.TyperGroup):
    """A group whose commands are names and a line of text, until one of them is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """See click: the command that the first argument names, and what is left for it."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, found and command(str(name)), rest


app = typer.Typer(
    name="i2v",
    cls=Imported,
    help="Photos become short videos: a queue, workers that lease from it, and a preview engine to try it all with.\n\n"
    "Start with `i2v demo`. Settings come from the environment or `.env`; `.env.example` lists them.",
    no_args_is_help=True,
    **GIVEN,
)


def _tell_version(asked: bool) -> None:
    if asked:
        installed = metadata.version("serverless-i2v")
        typer.echo(f"i2v {installed}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    _version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What `i2v` itself takes."""


def _stand_in() -> None:
    """Never called: see `Imported`."""


for each in COMMANDS:
    app.command(each.name, help=each.about)(_stand_in)


def main() -> None:
    """The `i2v` command. Errors are one line that says what to do; `-v` shows where they came from."""
    try:
        app()
    except Exception:
        from inference.process import told_errors  # noqa: PLC0415 - nothing has to be told of most runs

        with told_errors(verbose=bool({"-v", "--verbose"}.intersection(sys.argv))):
            raise


if __name__ == "__main__":
    main()
