"""The README says what is there. Its marked commands are run by `.ci/run`."""

import re
from pathlib import Path

import pytest
import typer.main

from inference.commands.main import app
from inference.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_it_is_short():
    """Under 200 lines."""
    assert len(README.splitlines()) < 200


def test_ci_finds_its_commands():
    """Each in the code block after its marker, starting with a virtual environment of its own."""
    for name in ("demo", "wan", "test"):
        block = re.search(rf"<!-- ci: {name} -->\n```sh\n(.+?)\n```", README, re.DOTALL)
        assert block
        assert block[1].startswith("python3 -m venv .venv && .venv/bin/pip install")


def test_the_tree_has_every_module():
    """One line per file of the package; for the server, for media and for Wan2.2, one line for all."""
    tree = re.search(r"## The tree\n\n```text\n(.+?)```", README, re.DOTALL)[1]
    told = set(re.findall(r"[\w/]+\.py|\w+/", tree))
    modules = {path.relative_to(ROOT / "inference").as_posix() for path in (ROOT / "inference").rglob("*.py")}
    folders = ("server/", "media/", "engines/wan/")
    expected = {name for name in modules if not name.endswith("__init__.py") and not name.startswith(folders)}
    assert set(folders) <= {*re.findall(r"^ +([\w/]+/) ", tree, re.MULTILINE)}
    assert expected <= told
    others = {"app.py", "runpod_handler.py", *(path.name for path in (ROOT / "images").glob("*.py"))}
    assert {name for name in told if name.endswith(".py")} <= modules | others


@pytest.mark.parametrize("command", re.findall(r"^i2v (\w+)", README, re.MULTILINE))
def test_every_command_exists(command):
    """What the README calls can be called."""
    assert command in typer.main.get_command(app).commands


def test_every_setting_exists():
    """Names in capitals are settings."""
    known = {name for field in Settings.model_fields.values() for name in field.validation_alias.choices}
    assert set(re.findall(r"`([A-Z][A-Z0-9_]{4,})`", README)) - {"SIGTERM"} <= known


def test_no_placeholder_was_left():
    """Outputs and figures are real ones."""
    assert not re.search(r"^[A-Z]+(_[A-Z]+)*$", README, re.MULTILINE)
