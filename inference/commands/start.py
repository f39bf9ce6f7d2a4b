"""What commands share: common arguments, reading settings, configuring logs, and checking outputs early."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from inference import logs
from inference.errors import NO_ROOM_ERRNOS, SettingsError, write_error
from inference.providers import QueueName
from inference.settings import QUEUE_URL_FIELDS, Settings

Photo = Annotated[Path, typer.Argument(help="A JPEG, PNG, WebP or HEIC file.", exists=True, dir_okay=False)]
Prompt = Annotated[str, typer.Argument(help="What should happen, e.g. “slow dolly-in”.")]
Seconds = Annotated[float, typer.Option("--seconds", "-s", help="Length of the video.", min=0.5, max=60)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show every step, and tracebacks of errors.")]
QueueUrl = Annotated[
    str | None,
    typer.Option("--url", "--api-url", help="The queue, instead of VERCEL_API_URL or GMANIMATO_API_URL."),
]
Url = Annotated[str | None, typer.Option("--url", help="The queue, instead of VERCEL_API_URL.")]

Host = Annotated[
    str | None, typer.Option(help="Address to listen on, such as 0.0.0.0; others than loopback need WORKER_API_KEY.")
]
Port = Annotated[int | None, typer.Option(help="Port; 0 picks a free one.", min=0, max=65535)]
Config = Annotated[
    Path | None,
    typer.Option(help="YAML file of settings, `name: value` a line; the environment and `.env` go before it."),
]

WakePort = Annotated[
    int | None,
    typer.Option(help="Port for `POST /wake`, with I2V_PUSH_TOKEN: the queue is asked at once.", min=0, max=65535),
]

OPTIONS = {"duration_s": "--seconds", "seed": "--seed", "negative_prompt": "--negative"}
"""The options for the fields of a request."""


def start(
    level: str | None,
    *required: str,
    verbose: bool,
    is_worker: bool = False,
    config: Path | None = None,
    **overrides: Any,
) -> Settings:
    """Reads settings and configures logging; a worker has a log file of its own. Raises SettingsError."""
    settings = Settings.load(*required, config=config, **overrides)
    try:
        logs.configure(
            "debug" if verbose else level or settings.log_level,
            log_format=None if settings.log_format == "auto" else settings.log_format,
            log_dir=settings.log_dir,
            worker_id=settings.worker_id if is_worker else None,
        )
    except OSError as error:
        raise SettingsError(f"LOG_DIR: {settings.log_dir} cannot be written: {error.strerror}") from None
    settings.warn_of_unread()
    return settings


def queue_url_field(queue: QueueName | None, config: Path | None = None) -> str:
    """The setting that `--url` stands for, which depends on the queue: `--queue`, or else I2V_QUEUE.

    Mistakes in other settings are left to whoever loads them next, which tells all at once.
    """
    if queue is None:
        with suppress(SettingsError):
            queue = Settings.load(config=config).queue
    return QUEUE_URL_FIELDS[queue or "lifeisshort"]


def check_mp4(output: Path) -> None:
    """Tries whether a video can be written to `output`, before anything is spent on one; leaves no trace.

    Raises SettingsError, DiskFull, NotWritable.
    """
    if output.suffix.lower() != ".mp4":
        raise SettingsError(f"--output: {output} has to end in .mp4")
    if os.path.isdir(output):  # noqa: PTH112 - of a name that is too long, Path.is_dir raises
        raise SettingsError(f"--output: {output} is a folder")
    if not output.absolute().parent.is_dir():
        raise SettingsError(f"--output: there is no folder {output.absolute().parent}")
    require_writable(output)


ROOM_BYTES = 1_000_000
"""Where there is no room for so much, there is none for a clip: a short one of the preview has about as much."""


def require_writable(output: Path) -> None:
    """Tries the folder of a file that is to be. Raises DiskFull, NotWritable."""
    try:
        output.exists()  # raises where its name is too long
        with tempfile.TemporaryFile(dir=output.absolute().parent) as file:
            file.write(bytes(ROOM_BYTES))
    except OSError as error:
        raise write_error(error, f"--output: {output.absolute()} cannot be written: {reason_of(error)}") from None


def reason_of(error: OSError) -> str:
    """In the words of the operating system, but for a full disk."""
    if error.errno in NO_ROOM_ERRNOS:
        return "there is no room left on this machine's disk"
    return (error.strerror or "for no reason that is known").lower()


def temporary_folder(prefix: str, parent: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """A folder for the length of a block. Raises DiskFull, NotWritable."""
    try:
        return tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise write_error(error, f"{parent or 'the temporary folder'} cannot be written: {error.strerror}") from None
