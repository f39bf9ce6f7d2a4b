"""A real transaction pooler in front of the tests' PostgreSQL, as Supabase has one on port 6543.

Whoever asks gets another connection of PostgreSQL's for each transaction: what was set or prepared in a session is
there for the next transaction or not, by chance. Debian's package is `pgbouncer`.
"""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import make_url

from tests.support.processes import until

SETTINGS = """
[databases]
* = host={host} user={user}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 4
"""


@contextmanager
def pooler(url: str) -> Iterator[str]:
    """The URL of a PostgreSQL's database through a pooler. Skips where there is none; fails where CI is set."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        reason = "pgbouncer is not installed: no transaction pooler to test against"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    behind = make_url(url)
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        Path(folder).chmod(0o755)
        port = free.getsockname()[1]
        free.close()
        settings = Path(folder) / "pgbouncer.ini"
        settings.write_text(SETTINGS.format(host=behind.query["host"], user=behind.username, port=port))
        # Which refuses to be root; whoever owns PostgreSQL's socket may use it.
        user = ["-u", Path(str(behind.query["host"])).owner()] if os.geteuid() == 0 else []
        with subprocess.Popen([program, "-q", *user, settings], stderr=subprocess.DEVNULL) as running:
            try:
                until(lambda: _listens(port), 10, "pgbouncer listens")
                through = behind.set(host="127.0.0.1", port=port, query={"pgbouncer": "true"})
                yield through.render_as_string(hide_password=False)
            finally:
                running.terminate()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True
