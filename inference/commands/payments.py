"""`i2v payments`: the paid generations of this machine."""

from datetime import UTC, datetime
from typing import Annotated

import anyio
import typer
from rich.table import Table

from inference import terminal
from inference.build.workers import build_ledger
from inference.commands.start import Verbose, start
from inference.payments.ledger import Payment

STYLES = {"in doubt": "bold yellow", "delivered": "green", "failed": "red", "created": "cyan"}


def payments(
    forget: Annotated[
        str | None, typer.Option(metavar="ITEM", help="Let a task whose payment is in doubt be paid for again.")
    ] = None,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask whether you looked at Runway first.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON lines.")] = False,
    verbose: Verbose = False,
) -> None:
    """What was paid for at Runway from this machine, oldest first, and what of today's budget is left.

    A payment is in doubt where Runway's answer to it was lost: look at https://dev.runwayml.com whether the clip was
    made. Its task is not paid for again until you say so with --forget, which refuses what may still be in flight.
    """
    settings = start("warning", verbose=verbose)
    ledger = build_ledger(settings)
    if forget is not None:
        payment = anyio.run(ledger.forgettable, forget)
        if not yes:
            _ask(payment)
        anyio.run(ledger.forget, forget)
        terminal.say(f"{forget} may be paid for again.")
        return
    kept = anyio.run(ledger.payments)
    if as_json:
        for payment in kept:
            terminal.json_line(payment.model_dump_json())
        return
    if kept:
        _show(kept, ledger.now())
    spent_usd = anyio.run(ledger.spent_usd)
    terminal.say(f"${spent_usd:.2f} of ${settings.runway_budget_usd:.2f} today (UTC), in {settings.ledger_path}")


def _ask(payment: Payment) -> None:
    known = f"Runway has it as {payment.external_id}" if payment.external_id else "Runway's answer was lost"
    terminal.say(f"{payment.model} for ${payment.cost_usd:.2f}, asked for at {_time(payment)}. {known}.")
    typer.confirm("Have you looked at dev.runwayml.com, and may it be paid for again?", abort=True, err=True)


def _show(kept: list[Payment], now: float) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("time (UTC)", "item", "model", "status", "dollars", "id"):
        table.add_column(title, no_wrap=True, justify="right" if title == "dollars" else "left")
    for payment in kept:
        status = payment.standing(now)
        failures = f" {payment.failures[-1]}" if payment.failures and payment.status == "failed" else ""
        table.add_row(
            _time(payment),
            terminal.shown(payment.item_id),
            terminal.shown(payment.model),
            terminal.shown(status, STYLES.get(status, "")).append_text(terminal.shown(failures)),
            f"{payment.cost_usd:.2f}",
            terminal.shown(payment.external_id or "-"),
        )
    terminal.show(table)


def _time(payment: Payment) -> str:
    return f"{datetime.fromtimestamp(payment.at, UTC):%Y-%m-%d %H:%M:%S}"
