"""Each table of jobs there is."""

from contextlib import ExitStack

import pytest

from tests.queues.video_jobs.subjects import TABLES, MemorySubject, SqlSubject
from tests.support import postgres


@pytest.fixture(scope="session")
def postgres_server():
    """A PostgreSQL for this process."""
    with postgres.server() as url:
        yield url


@pytest.fixture
def database_url(postgres_server):
    """An empty database."""
    with postgres.database(postgres_server) as url:
        yield url


@pytest.fixture(scope="session")
def table_url(postgres_server):
    """The database that has a table, made when it is first asked for: `table_url("ours")`."""
    urls = {}
    with ExitStack() as stack:

        def table_url(name):
            if name not in urls:
                urls[name] = stack.enter_context(postgres.database(postgres_server))
                SqlSubject.prepare(urls[name], TABLES[name])
            return urls[name]

        yield table_url


@pytest.fixture(params=["memory", *TABLES])
def make(request):
    """Makes an empty table; closes it afterwards."""
    made = []

    def make(worker_type=None):
        if request.param == "memory":
            return MemorySubject(worker_type)
        url = request.getfixturevalue("table_url")(request.param)
        made.append(SqlSubject(url, TABLES[request.param], worker_type))
        made[-1].wipe()
        return made[-1]

    yield make
    for subject in made:
        subject.close()


@pytest.fixture
def subject(make):
    """A table, for any kind of worker."""
    return make()


@pytest.fixture(params=list(TABLES))
def sql(request, table_url):
    """A table in PostgreSQL: our own, and one of an application."""
    made = SqlSubject(table_url(request.param), TABLES[request.param])
    made.wipe()
    yield made
    made.close()
