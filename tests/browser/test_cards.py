"""What the page shows of tasks, and what can be done to them, with a worker that the test plays."""

import io
import zipfile
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.photos import jpeg
from tests.browser.queue_process import clip, no_photo
from tests.browser.under_a_path import under_a_path
from tests.browser.visit import WAIT_MS
from tests.support.processes import until

HEIC = Path(__file__).parents[1] / "cases/photos/heic_p3_nclx.heic"


@pytest.fixture
def photos(tmp_path):
    """Three photos on disk."""
    paths = [tmp_path / name for name in ("harbour.jpg", "할머니 댁.jpg", "snow & ice.jpg")]
    for number, path in enumerate(paths):
        path.write_bytes(jpeg(number, 240, 160))
    return paths


@pytest.mark.parametrize("way", ["drop", "choose"])
def test_photos_become_tasks(queue, visit, photos, way):
    """Dropped or chosen, three at once: each is a task of one new group, with its prompt, seconds, name and picture."""
    seen = visit(queue)
    getattr(seen, way)(*photos)
    seen.submit("slow pan left", 1.5)
    expect(seen.cards).to_have_count(3, timeout=WAIT_MS)
    tasks = queue.tasks()
    assert {(task["prompt"], task["seconds"]) for task in tasks} == {("slow pan left", 1.5)}
    assert len({task["group_id"] for task in tasks}) == 1
    for path in photos:
        card = seen.cards.filter(has_text=path.name)
        expect(card).to_have_count(1)
        expect(card).to_contain_text("slow pan left")
    seen.expect_count("pending", 3)
    expect(seen.page.locator("article.task img")).to_have_count(3)
    seen.wait_for_pictures()


def test_a_folder_of_photos_is_dropped(queue, visit, photos):
    """With all that is in it, whatever is no photo left out."""
    folder = photos[0].parent
    (folder / "deeper").mkdir()
    photos[1].rename(folder / "deeper" / photos[1].name)
    (folder / "notes.txt").write_text("not a photo")
    seen = visit(queue)
    seen.drop(folder)
    expect(seen.page.locator("#uploads li")).to_have_count(3)
    seen.submit(seconds=1)
    expect(seen.cards).to_have_count(3, timeout=WAIT_MS)
    for path in photos:
        expect(seen.cards.filter(has_text=path.name)).to_have_count(1)


def test_a_bar_follows_its_worker(queue, visit, worker):
    """Stage, percent and time left as the worker tells them; never back, never 100 before the clip is there."""
    item_id = queue.submit(jpeg(1, 240, 160), name="lake.jpg", seconds=1)
    seen = visit(queue)
    seen.expect_connection("live")
    seen.expect_status(item_id, "pending")
    lease = worker.take(item_id)
    seen.expect_status(item_id, "processing")
    for fraction, percent in ((0.2, 20), (0.5, 50), (0.4, 50), (0.7, 70), (1.0, 99)):
        lease.beat("render", fraction)
        seen.expect_percent(item_id, percent)
    expect(seen.card(item_id).locator(".stage")).not_to_be_empty()
    lease.complete(1)
    seen.expect_status(item_id, "completed")
    percents = seen.percents()[item_id]
    assert percents == sorted(percents)
    assert len([percent for percent in percents if percent < 100]) >= 3, percents
    seen.expect_count("completed", 1)
    seen.expect_count("processing", 0)


def test_a_clip_plays_in_its_card(queue, visit, worker):
    """Frames are shown, and go on although other cards change and the list grows."""
    item_id = queue.submit(jpeg(2, 240, 160), seconds=1)
    worker.make(item_id, 2)
    seen = visit(queue)
    seen.expect_status(item_id, "completed")
    seen.play(item_id)
    other = queue.submit(jpeg(3, 240, 160))
    worker.take(other).beat("render", 0.5)
    seen.expect_status(other, "processing")
    seen.expect_count("processing", 1)
    assert seen.card(item_id).locator("video").evaluate("video => !video.paused && video.readyState === 4")


def test_a_clip_can_be_seeked_and_downloaded(queue, visit, worker):
    """The server answers ranges, and the file that arrives is the clip under the photo's name."""
    item_id = queue.submit(jpeg(0, 240, 160), name="바다.jpg", seconds=1)
    worker.make(item_id, 0)
    seen = visit(queue)
    seen.play(item_id)
    video = seen.card(item_id).locator("video")
    video.evaluate("video => new Promise(done => { video.onseeked = done; video.pause(); video.currentTime = 0.8; })")
    assert video.evaluate("video => Math.abs(video.currentTime - 0.8) < 0.05")
    with seen.page.expect_download() as started:
        seen.card(item_id).locator("a[download], a[href*='download']").first.click()
    assert started.value.suggested_filename.endswith(".mp4")
    assert "바다" in started.value.suggested_filename
    assert Path(started.value.path()).read_bytes() == clip(0)


def test_a_failure_says_why_and_is_tried_again(queue, visit, worker):
    """The reason as the worker gave it, harmless although it looks like HTML; the retry waits in line again."""
    item_id = queue.submit(jpeg(0, 240, 160))
    worker.take(item_id).fail("the prompt was <b>refused</b>: ask for something else")
    seen = visit(queue)
    seen.expect_status(item_id, "failed")
    expect(seen.card(item_id)).to_contain_text("the prompt was <b>refused</b>: ask for something else")
    seen.act(item_id, "retry")
    seen.expect_status(item_id, "pending")
    worker.make(item_id)
    seen.expect_status(item_id, "completed")
    assert queue.task(item_id)["status"] == "completed"


def test_a_waiting_task_is_cancelled_and_wanted_again(queue, visit):
    """Cancel ends it at once; retry puts it back."""
    item_id = queue.submit(jpeg(0, 240, 160))
    seen = visit(queue)
    seen.act(item_id, "cancel")
    seen.expect_status(item_id, "cancelled")
    seen.expect_count("cancelled", 1)
    seen.act(item_id, "retry")
    seen.expect_status(item_id, "pending")


def test_a_running_task_is_asked_to_stop(queue, visit, worker):
    """The worker hears it with its next beat."""
    item_id = queue.submit(jpeg(0, 240, 160))
    lease = worker.take(item_id)
    seen = visit(queue)
    seen.expect_status(item_id, "processing")
    seen.act(item_id, "cancel")
    until(lambda: queue.task(item_id)["cancel_requested"], 10, "the task is to be cancelled")
    assert lease.beat("render", 0.5)["cancel_requested"]


def test_deleting_asks_first(queue, visit, worker):
    """No, and it stays; yes, and it is gone, here and on the server."""
    item_id, other = (queue.submit(jpeg(kind, 240, 160)) for kind in (0, 1))
    worker.make(item_id)
    seen = visit(queue)
    seen.act(item_id, "delete")
    dialog = seen.page.locator("dialog[open]")
    expect(dialog).to_be_visible()
    seen.page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    assert queue.task(item_id)["status"] == "completed"
    seen.act(item_id, "delete")
    expect(dialog).to_be_visible()
    seen.confirm()
    expect(seen.card(item_id)).to_have_count(0)
    expect(seen.card(other)).to_have_count(1)
    assert [task["id"] for task in queue.tasks()] == [other]


def test_filters_show_one_state(queue, visit, worker):
    """Each tab shows its tasks alone, says how many, and has an address of its own."""
    waiting, done, failed = (queue.submit(jpeg(kind, 240, 160)) for kind in range(3))
    worker.make(done)
    worker.take(failed).fail("no")
    seen = visit(queue)
    expect(seen.cards).to_have_count(3)
    for item_id, status in ((done, "completed"), (failed, "failed"), (waiting, "pending")):
        seen.page.locator(f'nav.filters a[data-status="{status}"]').click()
        expect(seen.cards).to_have_count(1)
        expect(seen.card(item_id)).to_be_visible()
    seen.page.reload()
    expect(seen.cards).to_have_count(1)
    worker.make(waiting)  # what does not belong here any more leaves, or is at least not shown as waiting
    expect(seen.page.locator('article.task[data-status="pending"]')).to_have_count(0, timeout=WAIT_MS)


def test_a_group_comes_as_one_file(queue, visit, worker):
    """The archive opens and has each finished clip once, under names that can live in one folder."""
    names = ["beach.jpg", "beach.jpg", "산.png"]
    ids = [queue.submit(jpeg(kind, 240, 160), name=name, group="a trip") for kind, name in enumerate(names)]
    for kind, item_id in enumerate(ids):
        worker.make(item_id, kind)
    waiting = queue.submit(jpeg(3, 240, 160), group="a trip")
    seen = visit(queue)
    seen.expect_status(waiting, "pending")
    with seen.page.expect_download() as started:
        seen.page.locator("a[href*='.zip'], a[href*='zip']").first.click()
    assert started.value.suggested_filename.endswith(".zip")
    with zipfile.ZipFile(io.BytesIO(Path(started.value.path()).read_bytes())) as archive:
        assert archive.testzip() is None
        stored = archive.namelist()
        assert len(set(stored)) == 3
        assert sorted(archive.read(name) for name in stored) == sorted(clip(kind) for kind in range(3))
        assert sum("beach" in name for name in stored) == 2
        assert any("산" in name for name in stored), stored
        assert all(name.endswith(".mp4") and "/" not in name.replace("a trip/", "") for name in stored)


def test_a_photo_of_a_phone_has_a_picture(queue, visit, tmp_path):
    """HEIC, which this browser cannot show: the server makes a JPEG of it."""
    photo = tmp_path / "IMG_0001.HEIC"
    photo.write_bytes(HEIC.read_bytes())
    seen = visit(queue)
    seen.choose(photo)
    seen.submit(seconds=1)
    expect(seen.cards).to_have_count(1, timeout=WAIT_MS)
    seen.wait_for_pictures()


def test_a_file_that_is_no_photo_is_told_beside_those_that_are(queue, visit, photos, tmp_path):
    """Its name and what is wrong with it; the photo beside it becomes a task."""
    wrong = tmp_path / "shopping.jpg"
    wrong.write_bytes(no_photo())
    seen = visit(queue)
    seen.watch.expect(r"status of 400")
    seen.drop(wrong, photos[0])
    seen.submit(seconds=1)
    expect(seen.cards).to_have_count(1, timeout=WAIT_MS)
    expect(seen.page.get_by_text("shopping.jpg").first).to_be_visible()
    assert len(queue.tasks()) == 1


def test_tasks_of_others_appear_by_themselves(queue, visit, worker):
    """Submitted by a program while the page is open, done, and deleted by it: nothing is reloaded."""
    seen = visit(queue)
    seen.expect_connection("live")
    seen.page.evaluate("window.stayed = true")
    item_id = queue.submit(jpeg(4, 240, 160), prompt="from a program")
    expect(seen.card(item_id)).to_contain_text("from a program", timeout=WAIT_MS)
    worker.make(item_id, cost_usd=0.25)
    seen.expect_status(item_id, "completed")
    expect(seen.card(item_id).locator(".price")).to_contain_text("0.25")
    queue.ask("DELETE", f"tasks/{item_id}")
    expect(seen.card(item_id)).to_have_count(0, timeout=WAIT_MS)
    assert seen.page.evaluate("window.stayed")


def test_it_works_under_a_path_of_a_proxy(queue, visit, worker, photos):
    """All addresses are relative: pictures, events, uploads, buttons, clips, tabs and languages."""
    done = queue.submit(jpeg(5, 240, 160), group="a trip")
    worker.make(done, 5)
    with under_a_path(queue.port) as place:
        seen = visit(place)
        seen.expect_connection("live")
        seen.wait_for_pictures()
        seen.play(done)
        seen.choose(photos[0])
        seen.submit(seconds=1)
        expect(seen.cards).to_have_count(2, timeout=WAIT_MS)
        [waiting] = [task["id"] for task in queue.tasks() if task["id"] != done]
        seen.act(waiting, "cancel")
        seen.expect_status(waiting, "cancelled")
        seen.page.locator('nav.filters a[data-status="completed"]').click()
        expect(seen.cards).to_have_count(1)
        seen.page.reload()
        expect(seen.cards).to_have_count(1)
        seen.page.locator('a[hreflang="ko"]').click()
        expect(seen.page.locator("html")).to_have_attribute("lang", "ko")
        with seen.page.expect_download() as started:
            seen.card(done).locator("a[download]").click()
        assert Path(started.value.path()).read_bytes() == clip(5)
        assert seen.page.url.startswith(place.url)
