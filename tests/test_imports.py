"""What a process does not import: containers are paid for from their first moment, and people wait for a prompt."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

PIXELS = {"numpy", "PIL", "imageio_ffmpeg", "pillow_heif"}
ENGINES = {"torch", "diffusers", "transformers", "accelerate", "peft", "ftfy", "tokenizers", "safetensors"}
SERVERS = {
    "fastapi",
    "starlette",
    "uvicorn",
    "sqlalchemy",
    "psycopg",
    "jinja2",
    "redis",
    "celery",
    "boto3",
    "google.auth",
}

TICK = """
import anyio
from inference.fleet.opening import open_dispatcher
from inference.payments.records import MemoryRecords
from inference.settings import Settings

async def main():
    settings = Settings.load(api_url="https://queue.example", api_key="key")
    async with open_dispatcher(settings, SHAPE(settings), MemoryRecords(), {"gpu": None, "runway": None}):
        pass

anyio.run(main)
"""
"""All that a tick needs before it asks anybody: with it come the queue's client and its TLS context."""


def imported(program: str, **environment: str) -> set[str]:
    """The modules of a new process, and the packages they are in, when it has run `program`."""
    program += "\nimport json, sys\nprint(json.dumps([*sys.modules]))"
    given = {"PATH": os.environ["PATH"], "SSL_CERT_FILE": os.environ["SSL_CERT_FILE"]} | environment
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=given, check=True, capture_output=True, timeout=60
    )
    modules = json.loads(told.stdout.splitlines()[-1])
    return {name for module in modules for name in (module, module.partition(".")[0])}


def test_a_tick_on_modal_looks_at_no_pixel():
    """Once a minute, on a quarter of a core: neither engines nor what they need, nor adapters of other queues."""
    shape = "from inference.on_modal.deployment import on_modal as SHAPE\n"
    found = imported("import app\n" + shape + TICK, MODAL_IS_REMOTE="1")
    assert found & (PIXELS | ENGINES | SERVERS | {"inference.queues.gmanimato", "inference.engines.preview"}) == set()
    assert "modal" in found


def test_help_needs_nothing_of_what_commands_need():
    """A fifth of a second in place of one, most of it what draws the help."""
    found = imported("import inference.commands.main as cli\ntry: cli.app(['--help'])\nexcept SystemExit: pass")
    assert found & (PIXELS | ENGINES | SERVERS | {"httpx", "pydantic", "structlog", "anyio"}) == set()
    assert {name for name in found if name.startswith("inference")} == {
        "inference",
        "inference.commands",
        "inference.commands.layout",
        "inference.commands.main",
    }


def test_a_tick_for_runpod_looks_at_no_pixel():
    """From a crontab, once a minute."""
    shape = "from inference.on_runpod.tick import on_runpod as SHAPE\n"
    found = imported(shape + TICK)
    assert found & (PIXELS | ENGINES | SERVERS | {"inference.queues.gmanimato"}) == set()
