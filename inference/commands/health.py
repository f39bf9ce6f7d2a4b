"""`i2v health`: whether the workers on this box live. It runs every half a minute, so it reads no settings."""

from typing import Annotated

import typer

from inference import liveness


def health(
    worker_id: Annotated[str | None, typer.Argument(help="Only this worker, by its WORKER_ID.")] = None,
    within: Annotated[
        float, typer.Option(help="Seconds within which its loop has to have turned.", min=1)
    ] = liveness.LIMIT_S,
    *,
    end: Annotated[
        bool, typer.Option("--end", help="End a worker that hangs, for whatever starts it again when it has ended.")
    ] = False,
) -> None:
    """Whether the workers on this box live: exits 0 if the loop of each turned within a minute, else 1."""
    faults = liveness.faults(worker_id, within)
    if end and faults:
        liveness.end_hung(worker_id, within)
    for fault in faults:
        typer.echo(f"i2v: {fault}", err=True)
    if faults:
        raise typer.Exit(1)
    for it in liveness.workers(worker_id):
        typer.echo(f"worker {it.worker_id} (process {it.pid}) lives: its loop turned {it.silent_s:.1f} s ago")


if __name__ == "__main__":  # a health check that does not wait for the other commands
    typer.run(health)
