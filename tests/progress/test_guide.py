"""The guide to progress: its code runs, with a real worker of Celery, a real Redis and a real server."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import anyio
import httpx
import pytest
from websockets.sync.client import connect

from inference.progress.events import event_of
from inference.progress.hub import install
from tests.support.browser import Watch, running_browser
from tests.support.celery_workers import Worker, workers
from tests.support.processes import environment, until
from tests.support.redis_server import redis_server

ROOT = Path(__file__).parent.parent.parent
GUIDE = (ROOT / "docs" / "progress.md").read_text()

FILES = dict(re.findall(r"```\w+\n(?:# |<!-- )([\w.]+)(?: -->)?\n(.+?)```", GUIDE, re.DOTALL))
"""Blocks that begin with the name of a file."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The worked example as a user would start it. Gives the address of its server."""
    folder = tmp_path_factory.mktemp("guide")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    with redis_server(folder) as redis, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        worker = Worker(folder, "guide", "--pool", "solo", url=redis.url, module="tasks", at=folder)
        env = environment(REDIS_URL=redis.url, PYTHONPATH=f"{folder}:{ROOT}")
        command = [sys.executable, "-m", "uvicorn", "page:app", "--port", str(port), "--timeout-graceful-shutdown", "3"]
        with (folder / "page.log").open("wb") as log:
            page = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        try:
            with workers(worker):
                url = f"http://127.0.0.1:{port}"
                until(lambda: _answers(url), 30, f"the page answers: {(folder / 'page.log').read_text()}")
                yield url
        finally:
            page.terminate()
            assert page.wait(10) in {0, -15}


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/films/none").status_code == 200
    except httpx.TransportError:
        return False


def events_of(url: str, project_id: str) -> list[dict]:
    """What a page hears until the task has ended, as `film.html` asks for it."""
    path = re.search(r"EventSource\(`(.+?)`\)", FILES["film.html"])[1].replace("${project}", project_id)
    found = []
    with httpx.stream("GET", url + path, timeout=20) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data:"):
                found.append(json.loads(line.removeprefix("data:")))
                if found[-1]["type"] != "progress":
                    break
    return found


def test_the_worked_example(site):
    """A page that comes when all is over hears everything, over server-sent events and over a WebSocket."""
    httpx.post(f"{site}/films/film-1", json=["a fox", "a river"]).raise_for_status()
    heard = events_of(site, "film-1")
    assert [event["type"] for event in heard] == ["progress"] * (len(heard) - 1) + ["completion"]
    assert heard[0]["progress_percent"] == 0
    assert heard[-1]["result"] == {"video": "films/film-1.mp4"}
    path = re.search(r"WebSocket\(`ws://\$\{location.host\}(.+?)`\)", GUIDE)[1]
    path = path.replace("${project}", "film-1").replace("${last}", "0-0")
    with connect(site.replace("http:", "ws:") + path) as socket:
        again = [json.loads(socket.recv(timeout=5)) for _ in heard]
    assert all(event.pop("id") for event in again)
    assert again == heard


def test_its_page_in_a_browser(site):
    """One that is open before the task begins, and one that comes late, show how it ended."""
    with running_browser() as browser:
        context = browser.new_context()
        watch = Watch(context, site.removeprefix("http://"))
        early, late = context.new_page(), context.new_page()
        early.goto(f"{site}/films/film-3")
        httpx.post(f"{site}/films/film-3", json=["a fox", "a river"]).raise_for_status()
        for page in (early, late):
            if page is late:
                page.goto(f"{site}/films/film-3")
            page.wait_for_function("document.getElementById('says').textContent === 'films/film-3.mp4'", timeout=20_000)
            assert page.evaluate("document.getElementById('bar').value") == 100
        context.close()
        assert watch.problems() == []


def test_the_worked_example_that_fails(site):
    """The page hears of the error, although the task says nothing of it."""
    httpx.post(f"{site}/films/film-2", json=["a fox", ""]).raise_for_status()
    last = events_of(site, "film-2")[-1]
    assert (last["type"], last["error"]) == ("error", "a scene without words")
    assert last["details"]["error_code"] == "ValueError"


def test_the_events_are_events():
    """The examples of the JSON are what the code reads."""
    block = re.search(r"```json\n(.+?)```", GUIDE, re.DOTALL)[1]
    events = [event_of.validate_json(text) for text in re.split(r"\n(?=\{)", block)]
    assert [event.type for event in events] == ["progress", "completion", "error"]


@pytest.mark.anyio
async def test_its_other_code_runs():
    """One block after the other, as in one file."""
    blocks = [text for text in re.findall(r"```python\n(.+?)```", GUIDE, re.DOTALL) if not text.startswith("# ")]
    assert len(blocks) == 3
    blocks.append(blocks.pop(0))  # it speaks of a hub that the others make
    names: dict = {}
    try:
        exec("from inference.progress.web.app import progress_app\n" + "\n".join(blocks), names)
        async with names["hub"].subscribe("film-1", "0-0") as subscription:
            events = aiter(subscription)
            with anyio.fail_after(5):
                heard = [(await anext(events)).event for _ in range(4)]
        assert [event.type for event in heard] == ["progress", "completion", "progress", "completion"]
    finally:
        install(None)
        names["hub"].close()
