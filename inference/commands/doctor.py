"""`i2v doctor`: is everything there?"""

from pathlib import Path
from typing import Annotated, Literal

import anyio
import typer

from inference import doctor as doctor_module
from inference import logs, terminal
from inference.commands.start import Config, QueueUrl, Verbose, queue_url_field
from inference.on_modal.doctor import examine_modal
from inference.providers import EngineName, QueueName
from inference.push.doctor import examine_push
from inference.settings import Settings


def doctor(
    deployment: Annotated[
        Literal["modal", "push"] | None, typer.Argument(help="What to deploy to, instead of what runs here.")
    ] = None,
    url: QueueUrl = None,
    queue: Annotated[QueueName | None, typer.Option(help="Instead of I2V_QUEUE.")] = None,
    engine: Annotated[EngineName | None, typer.Option(help="Instead of I2V_ENGINE.")] = None,
    config: Config = None,
    *,
    verbose: Verbose = False,
) -> None:
    """Checks settings, ffmpeg, disk and the queue, or a deployment: one line each; exits 1 if something is wrong."""
    logs.configure("debug" if verbose else "error")

    def load() -> Settings:
        return Settings.load(config=config, queue=queue, engine=engine, **{queue_url_field(queue, config): url})

    async def main() -> bool:
        sound = True
        match deployment:
            case "modal":
                findings = examine_modal(load, Path.cwd())
            case "push":
                findings = examine_push(load)
            case _:
                findings = doctor_module.examine(load)
        async for finding in findings:
            terminal.finding(finding.name, finding.verdict, finding.text)
            sound = sound and finding.verdict != "FAIL"
        return sound

    if not anyio.run(main):
        raise typer.Exit(1)
