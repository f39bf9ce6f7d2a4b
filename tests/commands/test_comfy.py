"""`i2v comfy check`: what it says of a workflow and of a server, and how it ends."""

import json
import re
from pathlib import Path

import pytest

from inference.engines.comfyui.places import ROLES
from inference.engines.comfyui.template import Template
from tests.engines.comfyui.graphs import wan
from tests.support.comfy_server import ComfyServer
from tests.support.processes import i2v_here

EXAMPLE = Path(__file__).parents[1] / "cases" / "comfy" / "wan22_i2v_template.json"
GUIDE = Path(__file__).parents[2] / "docs" / "comfyui.md"
NOBODY = "127.0.0.1:9"
"""A port where nothing listens."""


@pytest.fixture
def check(tmp_path, capsys):
    """Runs the command in an empty folder."""

    def run(*arguments: object, **settings: object) -> tuple[int, list[str], str]:
        ran = i2v_here(capsys, tmp_path, "comfy", "check", *arguments, **settings)
        return ran.returncode, ran.stdout.splitlines(), ran.stderr

    return run


def test_a_workflow_is_checked_without_a_server(check):
    """What goes where, and that the rest was not looked at."""
    code, lines, _ = check(EXAMPLE, "--host", NOBODY)
    assert code == 0
    assert lines[0] == 'ok    photo            image of node 50 "i2v:photo" (LoadImage), now "example.png"'
    assert [line.split()[1] for line in lines] == [
        *("photo", "prompt", "negative_prompt", "frames", "fps", "width", "height", "seed", "frames", "server")
    ]
    assert lines[-1].startswith("note  server           node types and models were not checked: no ComfyUI answers at")


def test_the_guide_shows_what_the_command_says(check):
    """Its titles and its mapping are those that work."""
    guide = GUIDE.read_text()
    _, lines, _ = check(EXAMPLE, "--host", NOBODY)
    assert "\n".join(lines[:-1]) in guide
    mapping = json.loads(re.search(r"```json\n(.+?)\n```", guide)[1])
    titled, mapped = Template.load(EXAMPLE), Template(json.loads(EXAMPLE.read_text()), mapping)
    assert not mapped.problems
    assert mapped.places | {"fps": ()} == titled.places | {"fps": ()}
    for role in ROLES:
        assert f"`i2v:{role}`" in guide


def test_settings_stand_in_for_arguments_and_a_server_is_asked(check, tmp_path):
    """The file and the mapping of I2V_COMFY_…, and the server of COMFY_HOST."""
    (tmp_path / "w.json").write_text(json.dumps(wan()))
    (tmp_path / "m.json").write_text(json.dumps({"photo": "4", "prompt": "2"}))
    with ComfyServer(pace_s=0) as comfy:
        comfy.models["checkpoints"] = ["wan.safetensors"]
        settings = {"I2V_COMFY_WORKFLOW": "w.json", "I2V_COMFY_MAPPING": "m.json", "COMFY_HOST": comfy.url}
        code, lines, _ = check(**settings)
        assert code == 0
        assert lines[-1] == f"ok    server           {comfy.url} has every node type and model of the 9 nodes"
        comfy.models["checkpoints"] = []
        code, lines, _ = check(**settings)
    assert code == 1
    assert lines[-1] == (
        "FAIL  server           no model wan.safetensors for ckpt_name of node 1 (CheckpointLoaderSimple)"
    )


def test_what_a_workflow_misses_is_a_line_each(check, tmp_path):
    """Beside what it has, and whatever the server says."""
    (tmp_path / "w.json").write_text(json.dumps(wan()))
    code, lines, _ = check("w.json", "--host", NOBODY)
    assert code == 1
    failed = [line for line in lines if line.startswith("FAIL")]
    assert len(failed) == 2
    assert 'give one the title i2v:photo, such as node 4 "The photo" (LoadImage), then export it' in failed[0]
    assert "note  seed             no place for it" in "\n".join(lines)


def test_no_workflow_and_no_graph_are_errors(check, tmp_path):
    """One line on stderr, and nothing is asked of any server."""
    code, lines, said = check()
    assert (code, lines) == (1, [])
    assert said == "i2v: which workflow? Give a file, or set I2V_COMFY_WORKFLOW\n"
    (tmp_path / "w.json").write_text('{"nodes": [], "links": []}')
    code, lines, said = check("w.json")
    assert (code, lines) == (1, [])
    assert said == (
        "i2v: w.json: is in the format of ComfyUI's editor: export it in ComfyUI with Workflow → Export (API)\n"
    )
