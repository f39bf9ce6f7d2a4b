"""A browser for each module of tests, a context for each visit, and a queue to visit."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.browser.queue_process import PlayedWorker, QueueProcess
from tests.browser.visit import Visit
from tests.support.browser import running_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """See running_browser."""
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def quiet_queue(browser, tmp_path_factory) -> Iterator[QueueProcess]:  # noqa: ARG001 - without a browser, no queue
    """A queue without a key and without a worker, for the tests of a module one after the other."""
    with QueueProcess(tmp_path_factory.mktemp("queue")) as queue:
        yield queue


@pytest.fixture
def queue(quiet_queue) -> QueueProcess:
    """The module's queue with nothing in it."""
    quiet_queue.clear()
    return quiet_queue


@pytest.fixture
def worker(queue) -> PlayedWorker:
    """Who says that a clip is being made when nobody makes one."""
    return PlayedWorker(queue)


@pytest.fixture
def visit(browser) -> Iterator[Any]:
    """Opens pages: `visit(queue, "path", locale="ko-KR", …)`. At the end nothing unexpected may have gone wrong."""
    visits: list[Visit] = []
    with ExitStack() as stack:

        def open_page(queue: QueueProcess, path: str = "", **options: Any) -> Visit:
            visits.append(stack.enter_context(Visit(browser, queue, path, **options)))
            return visits[-1]

        yield open_page
        problems = [problem for each in visits for problem in each.watch.problems()]
    assert problems == []
