"""What the design asks of the tree itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "inference").rglob("*.py"))

LAYERS = [
    {"errors", "private"},
    {"task"},
    {
        "body",
        "progress",
        "media",
        "network",
        "storage",
        "storage_errors",
        "scratch",
        "private",
        "records",
        "bucket",
        "presigned",
    },
    {"ledger", "json_api"},
    {"queues", "engines"},
    {"keeper", "seat", "snapshots", "runpod_wire"},
    {"runner"},
    {"worker"},
    {"board"},
    {"plan"},
    {"dispatch", "host"},
    {"server", "client", "runpod_api"},
    {"settings", "settings_base", "logs", "terminal", "assets"},
    {"build"},
    {"doctor", "process", "fleet", "bake"},
    {"station", "platform", "doctor_modal"},
    {"by_hand", "invocation", "runpod_answer", "runpod_job", "runpod_tick"},
    {"endpoint"},
    {"cli", "cli_payments", "cli_render", "cli_runpod", "cli_start", "cli_weights"},
]
"""From the bottom up: a module imports from its own layer and those below. Settings stand above all that is built
from them, so that nothing below can read the environment."""

FOREIGN = {
    "torch": "inference/engines/wan/",
    "diffusers": "inference/engines/wan/",
    "transformers": "inference/engines/wan/",
    "modal": "app.py",
    "runpod": "runpod_handler.py",
    "boto3": "inference/bucket.py",
    "botocore": "inference/bucket.py",
    "fastapi": "inference/server/",
    "uvicorn": "inference/server/",
    "sqlalchemy": "inference/server/",
    "typer": "inference/cli",
}
"""Heavy or optional packages, and the only place that imports each."""


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(module: str) -> int:
    """The layer of `inference.<name>[.…]`."""
    name = module.split(".")[1]
    known = [number for number, names in enumerate(LAYERS) if name in names]
    assert known, f"{module} is in no layer: say where it belongs"
    return known[0]


def relative(path: Path) -> str:
    """The path as people say it."""
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_go_downward(path):
    """Data flows one way; nothing below knows who uses it."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts == ("inference", "__init__"):
        assert not any(name.startswith("inference.") for name in imports(path))
        return
    own = layer(".".join(parts))
    packages = {path.parent.name for path in MODULES if path.name == "__init__.py"} - {"inference"}
    for name in imports(path):
        if name.startswith("inference.") and name.count(".") >= 1:
            assert layer(name) <= own, f"{relative(path)} imports {name} from above"
            neighbours = {parts[1], name.split(".")[1]}
            assert neighbours != {"queues", "engines"}, "engines and queues do not know each other"
    assert packages


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_heavy_packages_are_imported_in_one_place(path):
    """`import inference` works without them because nobody else asks for them."""
    for name in imports(path):
        home = FOREIGN.get(name.split(".")[0])
        assert home is None or relative(path).startswith(home), f"{relative(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_the_environment_is_read_in_one_file(path):
    """os.environ and os.getenv belong to settings.py, which leaves even those to pydantic.

    One default is written elsewhere, for a library that reads it when it is loaded.
    """
    text = path.read_text().replace('os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")', "")
    assert path.name == "settings.py" or ("os.environ" not in text and "getenv" not in text)


def test_import_works_with_every_optional_package_blocked():
    """What the cron, a Runway container or a library user imports needs none of the extras."""
    blocked = [
        "torch",
        "diffusers",
        "transformers",
        "modal",
        "runpod",
        "boto3",
        "fastapi",
        "uvicorn",
        "sqlalchemy",
        "psycopg",
    ]
    blocked += ["pillow_heif"]
    program = f"""
import sys
for name in {blocked}: sys.modules[name] = None
import inference, inference.worker, inference.queues.lifeisshort, inference.queues.memory
import inference.engines.preview, inference.settings, inference.cli, inference.engines.wan.presets
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, cwd=ROOT, timeout=60)


def test_no_mocks_and_no_sleeping():
    """Fakes have behaviour; waiting is for events."""
    for path in (ROOT / "tests").rglob("*.py"):
        if path == Path(__file__) or path.parent.name == "bench":
            continue
        names = imports(path)
        assert not any("mock" in name for name in names if not name.startswith(("httpx", "trio"))), path
        assert "time.sleep(" not in path.read_text(), path
