"""A queue of a thousand tasks: pages of cards and not one list."""

import itertools

import pytest
from playwright.sync_api import expect

from inference.server.rows.store import NewItem, NewPhoto, new_id
from tests.browser.photos import jpeg
from tests.browser.queue_process import PlayedWorker, QueueProcess

TASKS = 1000
PHOTOS = 20
MAX_NODES = 1400
"""Of the whole document; Lighthouse calls more than that too many (developer.chrome.com, "dom-size")."""


@pytest.fixture(scope="module")
def full(browser, tmp_path_factory):  # noqa: ARG001 - without a browser, no queue
    """A queue with TASKS tasks that wait, ended or failed, written straight into its tables."""
    with QueueProcess(tmp_path_factory.mktemp("full")) as queue:
        seed = queue.task(queue.submit(jpeg(1, 240, 160), name="seed.jpg"))
        with queue.rows() as store:
            for number in range(PHOTOS):
                photo = NewPhoto(new_id(), seed["photo_storage_path"], original_filename=f"holiday-{number:02}.jpg")
                items = store.add(photo, [NewItem(f"prompt {number}.{each}") for each in range(TASKS // PHOTOS)])
                for item in itertools.islice(items, 3):
                    leased = store.lease("elsewhere.1", 600, None, item.id)
                    store.fail(leased.id, "elsewhere.1", "it was too dark")
        yield queue


def test_the_first_page_is_small(full, visit):
    """It has 48 cards and not a thousand, and its summary counts them all."""
    seen = visit(full)
    expect(seen.cards).to_have_count(48)
    nodes = seen.page.evaluate("document.getElementsByTagName('*').length")
    assert nodes < MAX_NODES, nodes
    with full.rows() as store:
        failed = len(store.list_items(status="failed", limit=TASKS))
    seen.expect_count("failed", failed)
    expect(seen.page.locator('#summary [data-count="all"]')).to_have_text(f"{TASKS + 1:,}")


def test_pages_lead_to_every_task(full, visit):
    """Next, and next again: no task twice."""
    seen = visit(full)
    ids = "cards => cards.map(card => card.dataset.id)"
    found = []
    for _ in range(3):
        expect(seen.cards).to_have_count(48)
        found += seen.cards.evaluate_all(ids)
        seen.page.locator("a[rel=next]").click()
        expect(seen.card(found[-1])).to_have_count(0)
    assert len(set(found)) == len(found) == 144
    everything = {task["id"] for task in full.tasks()}
    assert set(found) <= everything


def test_news_of_a_task_on_another_page_disturb_nobody(full, visit):
    """The last task in line is worked on: this page has no card for it, and stays as it is; the summary follows."""
    seen = visit(full)
    seen.expect_connection("live")
    before = seen.cards.evaluate_all("cards => cards.map(card => card.dataset.id)")
    with full.rows() as store:
        last = store.list_items(status="pending", limit=1000)[-1]
    assert last.id not in before
    lease = PlayedWorker(full).take(last.id)
    lease.beat("render", 0.5)
    seen.expect_count("processing", 1)
    assert seen.cards.evaluate_all("cards => cards.map(card => card.dataset.id)") == before
    lease.fail("that is all")
    seen.expect_count("processing", 0)


def test_a_page_of_a_filter_goes_on_within_it(full, visit):
    """The failed ones are on two pages, and only they."""
    seen = visit(full)
    seen.page.locator('nav.filters a[data-status="failed"]').click()
    failed = seen.page.locator('article.task[data-status="failed"]')
    expect(failed).to_have_count(48)
    expect(seen.cards).to_have_count(48)
    seen.page.locator("a[rel=next]").click()
    with full.rows() as store:
        rest = len(store.list_items(status="failed", limit=TASKS)) - 48
    assert 0 < rest < 48
    expect(failed).to_have_count(rest)
    expect(seen.cards).to_have_count(rest)
