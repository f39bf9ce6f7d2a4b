"""What commands share: common arguments, reading settings and configuring logs."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from inference import logs
from inference.errors import SettingsError
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
