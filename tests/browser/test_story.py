"""The whole of it with nothing played: `i2v up`, three photos, three clips, and a server that goes away and returns."""

from time import monotonic

import pytest
from playwright.sync_api import expect

from tests.browser.photos import jpeg
from tests.browser.queue_process import QueueProcess
from tests.browser.visit import AWAY, WAIT_MS

LONG_MS = 40_000
"""How long a clip may take that is really made."""


@pytest.fixture(scope="module")
def home(browser, tmp_path_factory):  # noqa: ARG001 - without a browser, no queue
    """A queue with a worker that makes previews."""
    with QueueProcess(tmp_path_factory.mktemp("home"), "up", HEARTBEAT_INTERVAL=1) as queue:
        yield queue


def test_three_photos_become_clips_that_play(home, visit, tmp_path):
    """Dropped together; the bars move, one is cancelled and wanted again, all are done, and one is played."""
    paths = [tmp_path / f"photo {number}.jpg" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(jpeg(number, 240, 160))
    seen = visit(home)
    seen.expect_connection("live")
    seen.drop(*paths)
    seen.submit("zoom in", 1.5)
    expect(seen.cards).to_have_count(3, timeout=WAIT_MS)
    last = max(home.tasks(), key=lambda task: task["created_at"])["id"]
    seen.act(last, "cancel")
    seen.expect_status(last, "cancelled")
    seen.act(last, "retry")
    expect(seen.page.locator('article.task[data-status="completed"]')).to_have_count(3, timeout=LONG_MS)
    bars = seen.percents()
    assert all(percents == sorted(percents) for percents in bars.values()), bars
    assert any(len([percent for percent in percents if percent < 100]) >= 2 for percents in bars.values()), bars
    seen.play(last)


def test_a_server_that_was_gone_is_found_again(home, visit, tmp_path):
    """Killed while the page is open, and started again on its port: the page says so, waits, and goes on by itself."""
    home.clear()
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(jpeg(3, 240, 160))
    seen = visit(home)
    seen.watch.expect(AWAY)
    seen.expect_connection("live")
    seen.page.evaluate("window.stayed = true")
    home.kill()
    seen.expect_connection("lost")
    seen.choose(photo)
    seen.submit(seconds=0.5)  # sent while nobody listens: it must not be lost
    seen.page.wait_for_timeout(5_000)  # the outage of which the contract speaks
    home.start()
    seen.expect_connection("live", timeout_ms=LONG_MS)
    other = home.submit(jpeg(4, 240, 160))
    seen.expect_status(other, "completed", timeout_ms=LONG_MS)
    expect(seen.page.locator('article.task[data-status="completed"]')).to_have_count(2, timeout=LONG_MS)
    assert len(home.tasks()) == 2  # once each
    assert seen.page.evaluate("window.stayed")


def test_a_server_that_is_stopped_does_not_wait_for_pages(home, visit):
    """An open page holds a stream that never ends: SIGTERM ends it at once. What changed meanwhile is looked up."""
    home.clear()
    deleted = home.submit(jpeg(5, 240, 160))
    home.ask("POST", f"tasks/{deleted}/cancel")
    seen = visit(home)
    seen.watch.expect(AWAY)
    seen.expect_connection("live")
    seen.expect_status(deleted, "cancelled")
    began = monotonic()
    assert home.stop() == 0
    assert monotonic() - began < 4  # it gives requests that are under way five
    with home.rows() as store:
        store.removal.delete(deleted)  # which no event tells
    home.start()
    seen.expect_connection("live", timeout_ms=LONG_MS)
    expect(seen.card(deleted)).to_have_count(0, timeout=WAIT_MS)
