"""What the design asks of the tree itself."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from inference import errors

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "inference").rglob("*.py"))

FLOORS = [
    ("errors", "private"),  # every error, drawn as a tree; files for this user alone
    ("task", "providers", "liveness", "config_file"),  # the values that travel; who serves which hint; files of the box
    ("progress", "media", "transfer", "payments", "sql"),  # what any queue or engine may need
    ("inputs",),  # what a task brings, put into a folder
    ("queues", "engines"),  # where tasks come from; what makes videos
    ("leasing", "server", "testing"),  # one lease, from first beat to report; the embedded queue; fakes that ship
    ("settings_base", "logs", "assets"),
    ("settings", "terminal"),  # above all that they describe, so that nothing below can read the environment
    ("build", "process"),  # the parts, made from settings; how a process ends
    ("doctor", "fleet"),  # is all there; the cron and its containers
    ("push",),  # jobs that are asked for by a call
    ("on_modal", "on_runpod"),  # what one platform asks for
    ("commands",),  # `i2v`; beside it stand app.py and runpod_handler.py
]
"""The rooms of `inference/`, from the ground up. A module imports from its own room and from floors below, so rooms on
one floor do not know each other."""

FOREIGN = {
    "torch": "inference/engines/wan/",
    "diffusers": "inference/engines/wan/",
    "transformers": "inference/engines/wan/",
    "modal": "app.py",
    "runpod": "runpod_handler.py",
    "boto3": "inference/transfer/bucket.py",
    "botocore": "inference/transfer/bucket.py",
    "google": "inference/push/",
    "grpc": "inference/push/",
    "fastapi": "inference/server/",
    "uvicorn": "inference/server/",
    "sqlalchemy": ("inference/server/", "inference/sql/", "inference/queues/video_jobs/"),
    "typer": "inference/commands/",
    "celery": "inference/progress/celery.py",
    "jinja2": "inference/server/page/",
    "kombu": "inference/progress/celery.py",
    "opentelemetry": "inference/progress/tracing.py",
    "redis": "inference/progress/redis.py",
    "starlette": ("inference/server/", "inference/push/", "inference/progress/web/", "inference/on_modal/calls.py"),
    "httpx_ws": "inference/engines/comfyui/",
    "wsproto": "inference/engines/comfyui/",
}
"""Heavy or optional packages, and the only place that imports each."""

OWN = {
    # A queue's wire belongs to its adapter, and queues are opened in one place.
    "inference.queues.lifeisshort": ("inference/queues/", "inference/build/"),
    "inference.queues.gmanimato": ("inference/queues/", "inference/build/"),
    "inference.queues.video_jobs": (
        "inference/queues/",
        "inference/testing/memory_jobs.py",
        "inference/push/",
        "inference/build/",
    ),
    # Engines are built in one place. What else knows one of them looks after what that engine needs: its weights on
    # disk, its prices, what a platform has to have for it.
    "inference.engines.wan": (
        "inference/engines/wan/",
        "inference/build/",
        "inference/doctor.py",
        "inference/on_modal/bake.py",
        "inference/on_modal/deployment.py",
        "inference/on_modal/doctor.py",
        "inference/commands/",
    ),
    "inference.engines.runway": (
        "inference/engines/runway/",
        "inference/build/",
        "inference/doctor.py",
        "inference/on_modal/deployment.py",
    ),
    # Nothing prints but commands, and the end of the process that they are. `modal run app.py` is one, too.
    "inference.terminal": (
        "inference/commands/",
        "inference/process.py",
        "inference/on_modal/bake.py",
        "inference/on_modal/one_off.py",
    ),
}
"""Modules of ours that few may know, with all beneath them, and who."""


@cache
def parsed(path: Path) -> ast.Module:
    """A file of Python, read once for all rules."""
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def floor(module: str) -> int:
    """The floor of `inference.<room>[.…]`."""
    room = module.split(".")[1]
    known = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert known, f"{module} is on no floor: say where it belongs"
    return known[0]


def relative(path: Path) -> str:
    """The path as people say it."""
    return path.relative_to(ROOT).as_posix()


def test_imports_go_downward():
    """Data flows one way; nothing below knows who uses it."""
    wrong = []
    for path in MODULES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        ours = sorted(name for name in imports(path) if name.startswith("inference."))
        if parts == ("inference", "__init__"):
            wrong += [f"{relative(path)} imports {name}" for name in ours]
            continue
        wrong += [
            f"{relative(path)} imports {name}, which is not below it"
            for name in ours
            if name.split(".")[1] != parts[1] and floor(name) >= floor(".".join(parts))
        ]
    assert wrong == []


def test_heavy_packages_are_imported_in_one_place():
    """`import inference` works without them because nobody else asks for them."""
    wrong = []
    for path in MODULES:
        for name in sorted(imports(path)):
            home = FOREIGN.get(name.split(".")[0])
            if home is not None and not relative(path).startswith(home):
                wrong.append(f"{relative(path)} imports {name}")
    assert wrong == []


def test_every_error_is_in_the_tree():
    """Subclasses of I2VError are defined in errors.py alone, where all of them are drawn."""
    tree = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    wrong = [
        f"{relative(path)}: {node.name} belongs in inference/errors.py"
        for path in MODULES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef) and {ast.unparse(base).rpartition(".")[2] for base in node.bases} & tree
    ]
    assert [line for line in wrong if not line.startswith("inference/errors.py: ")] == []


def test_what_belongs_to_few_is_imported_by_few():
    """A new queue, engine or command is a file, and not a change to everything around it."""
    wrong = [
        f"{relative(path)} imports {name}"
        for path in MODULES
        for name in sorted(imports(path))
        for owned, homes in OWN.items()
        if name.startswith(owned) and not relative(path).startswith(homes)
    ]
    assert wrong == []


def test_the_environment_is_read_in_one_file():
    """os.environ and os.getenv belong to settings.py, which leaves even those to pydantic.

    One default is written elsewhere, for a library that reads it when it is loaded; and TMPDIR is no setting, but
    `tempfile` would write to the disk before it says what is in it.
    """
    elsewhere = re.compile(r'os\.environ\.(setdefault\("OMP_WAIT_POLICY", "PASSIVE"\)|get\("TMPDIR", ""\))')
    wrong = []
    for path in MODULES:
        text = elsewhere.sub("", path.read_text())
        if path.name != "settings.py" and ("os.environ" in text or "getenv" in text):
            wrong.append(relative(path))
    assert wrong == []


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
        "google",
        "grpc",
        "starlette",
        "redis",
        "celery",
        "opentelemetry",
        "jinja2",
    ]
    blocked += ["pillow_heif"]
    program = f"""
import sys
for name in {blocked}: sys.modules[name] = None
import inference, inference.leasing.polling, inference.queues.lifeisshort, inference.testing.memory_queue
import inference.engines.preview, inference.settings, inference.progress.hub
import inference.engines.runway.engine, inference.engines.wan.presets
import inference.commands.main as cli
for each in cli.COMMANDS: cli.command(each.name)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, cwd=ROOT, timeout=60)


def test_clients_share_one_tls_context():
    """Or they have a transport of their own, which does. The hub's is the only client of its process."""
    wrong = [
        f"{relative(path)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"httpx.Client", "httpx.AsyncClient"}
        for given in [{keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}]
        if given.get("verify") != "tls_context()" and "GuardedTransport(" not in given.get("transport", "")
    ]
    assert [line for line in wrong if not line.startswith("inference/engines/wan/hub.py")] == []


def test_no_mocks_and_no_sleeping():
    """Fakes have behaviour; waiting is for events."""
    for path in (ROOT / "tests").rglob("*.py"):
        if path == Path(__file__) or path.parent.name == "bench":
            continue
        text = path.read_text()
        assert "time.sleep(" not in text, path
        if "mock" in text:
            assert not any("mock" in name for name in imports(path) if not name.startswith(("httpx", "trio"))), path
