"""`i2v comfy …`: the operator's graph for the ComfyUI engine."""

from pathlib import Path
from typing import Annotated

import typer

from inference import logs, process, terminal
from inference.commands.layout import MARKUP
from inference.commands.start import Verbose
from inference.engines.comfyui.api import ComfyApi, base_url
from inference.engines.comfyui.needs import lacking
from inference.engines.comfyui.template import Template
from inference.errors import EngineFailed, ProviderUnavailable, SettingsError
from inference.settings import Settings

app = typer.Typer(
    name="comfy",
    help="The ComfyUI engine: graphs for tasks that bring only a photo.",
    no_args_is_help=True,
    rich_markup_mode=MARKUP,
)

NAME_CHARS = 15
"""The longest name of a role, `negative_prompt`, for columns."""


@app.callback()
def _group() -> None:
    """Without this, a group of one command would be that command."""


@app.command(epilog="Example: `i2v comfy check workflow_api.json --host 127.0.0.1:8188`")
def check(
    workflow: Annotated[
        Path | None,
        typer.Argument(help="A graph in API format, instead of I2V_COMFY_WORKFLOW.", exists=True, dir_okay=False),
    ] = None,
    mapping: Annotated[
        Path | None,
        typer.Option(help="Where photo and prompt go, instead of I2V_COMFY_MAPPING.", exists=True, dir_okay=False),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Where ComfyUI listens, instead of COMFY_HOST.")] = None,
    *,
    verbose: Verbose = False,
) -> None:
    """Says what of a task goes where in WORKFLOW, and what it or the ComfyUI server lacks; exits 1 if something does.

    Without a server that answers, only the file is checked.
    """
    logs.configure("debug" if verbose else "error")
    settings = Settings.load(comfy_host=host)
    workflow = workflow or settings.comfy_workflow
    if workflow is None:
        raise SettingsError("which workflow? Give a file, or set I2V_COMFY_WORKFLOW")
    template = Template.read(workflow, mapping or settings.comfy_mapping)
    for line in template.describe():
        _line(line.role, "ok" if line.is_place else "note", line.text)
    for problem in template.problems:
        _line("workflow", "FAIL", problem)
    problems = list(template.problems)

    async def main() -> None:
        problems.extend(await _ask_server(settings.comfy_host, template))

    process.run(main)
    if problems:
        raise typer.Exit(1)


async def _ask_server(host: str, template: Template) -> list[str]:
    """Tells, and returns, what the server lacks. It may be off, which is no fault of the workflow."""
    try:
        async with ComfyApi(base_url(host), patience_s=0) as api:
            await api.system_stats()
            missing = await lacking(api, template.graph, template.filled)
    except (ProviderUnavailable, EngineFailed) as error:
        _line("server", "note", f"node types and models were not checked: {error}")
        return []
    for line in missing:
        _line("server", "FAIL", line)
    if not missing:
        _line("server", "ok", f"{host} has every node type and model of the {len(template.graph)} nodes")
    return missing


def _line(name: str, verdict: str, text: str) -> None:
    terminal.finding(f"{name:<{NAME_CHARS}}", verdict, text)
