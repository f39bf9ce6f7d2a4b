"""The README says what is there. Its marked commands are run by `.ci/run`."""

import re
import subprocess
from pathlib import Path

import pytest
import typer.main

from inference.commands.main import app
from inference.settings import Settings
from tests.test_architecture import FLOORS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
KOREAN = (ROOT / "docs" / "README.ko.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_it_is_short():
    """Under 200 lines."""
    assert len(README.splitlines()) < 200


def test_ci_finds_its_commands():
    """Each in the code block after its marker, starting with a virtual environment of its own."""
    for name in ("demo", "wan", "test"):
        block = re.search(rf"<!-- ci: {name} -->\n```sh\n(.+?)\n```", README, re.DOTALL)
        assert block
        assert block[1].startswith("python3 -m venv .venv && .venv/bin/pip install")


def entries(folder: Path) -> set[str]:
    """What git would see in a folder, by name; folders end with a slash. Names that begin with a dot are for tools."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {name.partition("/")[0] + ("/" if "/" in name else "") for name in listed if not name.startswith(".")}


def test_the_tree_is_there():
    """What is at the top, one line each. The rooms of `inference/` are below it, on the same page."""
    tree = re.search(r"## The tree\n\n```text\n(.+?)```", ARCHITECTURE, re.DOTALL)[1]
    for_people = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"}  # known by their names
    told = re.findall(r"^([\w./]+)", tree, re.MULTILINE)
    assert set(told) == entries(ROOT) - for_people
    assert len(told) == len(set(told))


def test_the_architecture_page_has_every_module():
    """On the floors of `test_architecture.py`, in their order; a room and each of its modules has a line of its own."""
    rooms = re.search(r"## Rooms.+?```text\n(.+?)```", ARCHITECTURE, re.DOTALL)[1]
    floors = [set(re.findall(r"^(\w+)", floor, re.MULTILINE)) for floor in rooms.split("\n\n")]
    assert floors == [set(floor) for floor in FLOORS]
    told, room = [], ""
    for indent, name in re.findall(r"^( *)([\w./]+)", rooms, re.MULTILINE):
        room = room if indent else name
        told.append(f"{room}{name}" if indent else name)
    modules = {path.relative_to(ROOT / "inference").as_posix() for path in (ROOT / "inference").rglob("*.py")}
    assert {name for name in told if name.endswith(".py")} == {it for it in modules if not it.endswith("__init__.py")}
    assert len(told) == len(set(told))


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


def commands(page: str) -> list[str]:
    """The lines of a page's code blocks without what is said of them."""
    blocks = re.findall(r"^```sh\n(.+?)^```", page, re.MULTILINE | re.DOTALL)
    return [re.sub(r"\s+# .*$", "", line) for block in blocks for line in block.splitlines()]


def test_the_korean_readme_has_the_same_commands_in_the_same_order():
    """And the same headings, tables and figures: whoever changes one page is led to the other."""
    assert commands(KOREAN) == commands(README)
    for pattern in (r"^(#+) ", r"^\|[-|]+\|$", r"^```(\w*)$", r"^<!-- .+ -->$", r"`(I2V_\w+)`", r"\$(0\.\d+)"):
        assert re.findall(pattern, KOREAN, re.MULTILINE) == re.findall(pattern, README, re.MULTILINE), pattern


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda it: it.name)
def test_links_lead_somewhere(page):
    """Files that are there, from where the page is."""
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link
