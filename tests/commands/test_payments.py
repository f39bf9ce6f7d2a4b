"""The command line where it costs money: a Runway on loopback, one ledger on disk.

Whoever is interrupted or killed is a real process.
"""

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

from inference import doctor
from inference.media.video import probe
from inference.settings import Settings
from tests.support.processes import Process, Site, environment, i2v_here, jpeg, until
from tests.support.runway_server import CRASHED_AFTER, SLOW, Fault, RunwayServer


@pytest.fixture
def runway():
    """A Runway that works."""
    with RunwayServer() as server:
        yield server


class Home:
    """A folder with a photo, a ledger, and the command."""

    def __init__(self, folder: Path, runway: RunwayServer, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.runway, self.capsys = folder, runway, capsys
        self.ledger = folder / "state" / "ledger.db"
        (folder / "photo.jpg").write_bytes(jpeg())
        self.settings = {
            "RUNWAYML_API_SECRET": runway.key,
            "I2V_RUNWAY_URL": runway.url,
            "RUNWAY_POLL_INTERVAL": 0.05,
            "I2V_LEDGER": self.ledger,
        }

    def env(self, **settings: object) -> dict[str, str]:
        """The environment of a command."""
        return environment(**({"TMPDIR": self.folder} | self.settings | settings))

    def i2v(self, *arguments: object, typed: str = "", **settings: object) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        given = {"TMPDIR": self.folder} | self.settings | settings
        ran = i2v_here(self.capsys, self.folder, *arguments, typed=typed, **given)
        assert self.runway.key not in ran.stdout + ran.stderr
        return ran

    def payments(self) -> list[dict]:
        """The books, as a script reads them."""
        return [json.loads(line) for line in self.i2v("payments", "--json").stdout.splitlines()]


@pytest.fixture
def home(tmp_path, runway, capsys):
    """A clean place."""
    return Home(tmp_path, runway, capsys)


def test_a_rendering_is_in_the_books(home):
    """Its price is told before and after; the same command again is another clip."""
    for times in (1, 2):
        ran = home.i2v("render", "photo.jpg", "pan left", "--engine", "runway", "-s", "2", "-o", "out.mp4")
        assert ran.returncode == 0, ran.stderr
        assert "runway, model gen4_turbo: up to $0.05 a second, $10.00 a day" in ran.stderr
        assert "$0.10" in ran.stderr
        assert probe(home.folder / "out.mp4").frames == 48
        assert home.runway.paid == {"pan left": times}
    books = home.payments()
    assert [it["status"] for it in books] == ["delivered", "delivered"]
    assert all(it["item_id"].startswith("render-") for it in books)
    table = home.i2v("payments")
    assert len(table.stdout.splitlines()) == 3
    assert home.runway.tasks[0].id in table.stdout
    assert "$0.20 of $10.00 today" in table.stderr


def test_an_interrupted_rendering_goes_on(home):
    """Ctrl-C leaves the task running; the same command fetches it, and nothing is paid twice."""
    home.runway.hold()
    arguments = ("render", "photo.jpg", "pan left", "--engine", "runway", "-s", "2")
    process = Process(home.folder, "interrupted", *arguments, env=home.env())
    home.runway.wait_for(lambda runway: runway.asked("poll") > 1)
    process.send(signal.SIGINT)
    assert process.wait() == 130
    assert "the same command fetches what was paid for" in process.stderr.read_text()
    home.runway.release()
    ran = home.i2v(*arguments)
    assert ran.returncode == 0, ran.stderr
    assert home.runway.paid == {"pan left": 1}
    assert [it["status"] for it in home.payments()] == ["delivered"]


def test_what_is_in_doubt_waits_for_a_person(home):
    """It is told, listed, and paid for again only after somebody has said so."""
    home.runway.faults["create"].append(CRASHED_AFTER)
    arguments = ("render", "photo.jpg", "pan left", "--engine", "runway", "-s", "2")
    ran = home.i2v(*arguments)
    item_id = re.search(r"i2v payments --forget (\S+)`", ran.stderr)[1]
    assert (ran.returncode, len(home.runway.tasks)) == (1, 1)
    assert "in doubt" in home.i2v("payments").stdout
    refused = home.i2v("payments", "--forget", item_id, typed="n\n")
    assert (refused.returncode, "Runway's answer was lost" in refused.stderr) == (1, True)
    assert [it["status"] for it in home.payments()] == ["intended"]
    assert home.i2v("payments", "--forget", item_id, typed="y\n").returncode == 0
    assert home.i2v("payments", "--forget", item_id, "--yes").returncode == 1  # nothing is open any more
    assert home.i2v(*arguments).returncode == 0
    assert [it["status"] for it in home.payments()] == ["in_doubt", "delivered"]
    assert "forgotten" in home.i2v("payments").stdout


def test_what_is_in_flight_is_not_forgotten(home):
    """A second payment while the first is on its way is what the books are there to prevent."""
    home.runway.faults["create"].append(SLOW)
    arguments = ("render", "photo.jpg", "pan left", "--engine", "runway", "-s", "2")
    process = Process(home.folder, "in-flight", *arguments, env=home.env())
    home.runway.wait_for(lambda runway: runway.asked("create"))
    table = home.i2v("payments").stdout
    [item_id] = re.findall(r"render-\w+", table)
    assert "being paid" in table
    for known, said in ((item_id, "may be in flight"), ("nobody", "no payment of nobody is in the books")):
        refused = home.i2v("payments", "--forget", known, "--yes")
        assert (refused.returncode, said in refused.stderr) == (1, True), refused.stderr
    home.runway.release_hanging()
    assert process.wait(20) == 0
    assert [it["status"] for it in home.payments()] == ["delivered"]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"RUNWAYML_API_SECRET": ""}, "RUNWAYML_API_SECRET is not set"),
        ({"RUNWAYML_API_SECRET": "key_wrong"}, "does not accept the key"),
        ({"I2V_RUNWAY_BUDGET": "0.05"}, "raise I2V_RUNWAY_BUDGET"),
        ({"RUNWAY_DEFAULT_RATIO": "640:480"}, "RUNWAY_DEFAULT_RATIO"),
        ({"I2V_LEDGER": "/proc/ledger.db"}, "/proc/ledger.db cannot be used"),
    ],
)
def test_what_is_missing_is_said_in_one_line(home, settings, said):
    """And nothing was paid."""
    ran = home.i2v("render", "photo.jpg", "--engine", "runway", "-s", "2", **settings)
    told = [line for line in ran.stderr.splitlines() if line.startswith("i2v: ")]
    assert (ran.returncode, len(told), said in told[0]) == (1, 1, True), ran.stderr
    assert home.runway.tasks == []


@pytest.mark.parametrize("fate", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_worker_that_ends_leaves_its_task_to_the_next(home, runway, tmp_path, fate):
    """`i2v work` on any box: the lease is handed back, or runs out; the clip is paid for once.

    Only the key says that it is Runway's work, as the documents of the queue have it: nobody gets a preview instead.
    """
    runway.hold()
    settings = home.settings | {
        "I2V_SHUTDOWN_GRACE": 0,
        "LEASE_DURATION": 4,
        "I2V_LEASE_EXTENSION": 4,
    }
    with Site(tmp_path / "site") as site:
        [item_id] = site.submit(seconds=2)
        first = site.worker("first", **settings)
        runway.wait_for(lambda it: it.asked("poll") > 1)
        first.send(fate)
        first.wait()
        runway.release()
        site.worker("second", **settings)
        until(site.has_ended, 30, "it is done")
        task = site.task(item_id)
        assert (task["status"], task["runway_task_id"]) == ("completed", runway.tasks[0].id), task
        site.stop_workers()
    assert runway.paid == {"zoom in": 1}
    assert [it["status"] for it in home.payments()] == ["delivered"]


@pytest.mark.anyio
class TestDoctor:
    """What can be known before money is spent."""

    async def found(self, home, **settings):
        """What it says of Runway and the ledger."""
        given = {"runway_key": home.runway.key, "runway_url": home.runway.url, "ledger_path": home.ledger} | settings
        given = {name: value for name, value in given.items() if value is not None}
        found = [it async for it in doctor.examine(lambda: Settings.isolated(**given))]
        return {it.name: it for it in found}

    async def test_a_key_that_is_accepted(self, home):
        """With the credits that are left, and what was spent today."""
        found = await self.found(home)
        assert (found["runway"].verdict, found["ledger"].verdict) == ("ok", "ok")
        assert "1000000 credits ($10000.00)" in found["runway"].text
        assert "$0.00 of $10.00 today" in found["ledger"].text

    @pytest.mark.parametrize("key, said", [("key_wrong", "does not accept the key"), (None, "is not set")])
    async def test_a_key_that_is_not(self, home, key, said):
        """It is not repeated."""
        found = await self.found(home, runway_key=key, engine="runway")
        assert (found["runway"].verdict, said in found["runway"].text) == ("FAIL", True)
        assert "key_wrong" not in found["runway"].text

    async def test_a_runway_that_does_not_answer(self, home):
        """In one line."""
        home.runway.faults["organization"] += [Fault(503), Fault(200, b"[]"), Fault()]
        for _ in range(3):
            found = (await self.found(home))["runway"]
            assert (found.verdict, "\n" in found.text) == ("FAIL", False)

    async def test_a_ledger_that_cannot_be_written(self, home):
        """Named by its setting."""
        found = await self.found(home, ledger_path=Path("/proc/ledger.db"))
        assert (found["ledger"].verdict, "I2V_LEDGER" in found["ledger"].text) == ("FAIL", True)

    async def test_without_runway_nothing_is_asked(self, home):
        """A box with a GPU needs neither."""
        assert not {"runway", "ledger"} & set(await self.found(home, runway_key=None))
        assert home.runway.requests == []
