"""The page as it comes from the server: what it says of every task, in which language, and what it lets happen."""

import json
import re
import sqlite3
import zipfile
from contextlib import closing
from io import BytesIO

import pytest
from PIL import Image

from inference.queues.item import CRASHED
from inference.server.page.rendering import HEADERS
from inference.server.page.views import PAGE_SIZE
from inference.server.rows.store import NewItem, NewPhoto, Store, new_id
from tests.server.harness import KEY, app_client, config, jpeg
from tests.server.page.site import CLIP, Page

FRAGMENT = {"x-fragment": "1"}
KOREAN = {"accept-language": "ko-KR,ko;q=0.9"}
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>'


def test_an_empty_queue_says_what_to_do(site):
    """Whoever comes first finds out how it begins."""
    page = site.page()
    assert "Drop a few photos" in page.one(class_="empty").text
    assert page.one(id="photos")["type"] == "file"
    assert "multiple" in page.one(id="photos")
    assert page.one("textarea", id="prompt")
    assert (page.one(id="seconds")["min"], page.one(id="seconds")["max"]) == ("0.5", "60")
    assert page.one("button", id="submit").text == "Make clips"
    assert page.one("body")["data-max-bytes"] == str(50 * 1024 * 1024)
    assert page.one(id="connection")["data-state"] == "unknown"  # until the script has heard from the server
    assert not page.all(class_="notice")  # nothing waits, so no worker is missed
    assert not page.all(class_="pages")


def test_every_state_is_shown(site):
    """A card says how its task is, and offers what can be done about it."""
    names = ("waiting", "running", "stopping", "done", "failed", "cancelled")
    item = {name: site.add(f"{name}.jpg", prompt=f"prompt of {name}", seconds="3") for name in names}
    site.lease(item["running"])
    site.beat(item["running"], "denoise", 0.4)
    site.lease(item["stopping"], "box.2")
    site.client.post(f"/api/tasks/{item['stopping']['id']}/cancel")
    site.complete(item["done"], cost_usd=0.25)
    site.fail(item["failed"], "the engine <b>stopped</b>")
    site.client.post(f"/api/tasks/{item['cancelled']['id']}/cancel")

    page = site.page()
    cards = {name.removesuffix(".jpg"): card for name, card in page.cards().items()}
    assert list(cards) == list(names)[::-1]  # the newest on top
    assert {name: card["data-status"] for name, card in cards.items()} == {
        "waiting": "pending",
        "running": "processing",
        "stopping": "processing",
        "done": "completed",
        "failed": "failed",
        "cancelled": "cancelled",
    }
    buttons = {name: [it["data-action"] for it in page.all("button", card)] for name, card in cards.items()}
    assert buttons == {
        "waiting": ["cancel"],
        "running": ["cancel"],
        "stopping": [],
        "done": ["delete"],
        "failed": ["retry", "delete"],
        "cancelled": ["retry", "delete"],
    }
    for name, card in cards.items():
        assert card["data-id"] == item[name]["id"]
        assert f"prompt of {name}" in card.text
        assert "3 s" in card.text
        assert page.one(id=card["aria-labelledby"]).text == f"{name}.jpg"

    running = cards["running"]
    bar = page.one("progress", running)
    assert (bar["value"], bar["max"], bar["aria-label"]) == ("40", "100", "running.jpg: progress")
    assert page.one(within=running, class_="stage").text == "Painting the frames"
    assert page.one(within=running, class_="eta").text == "—"
    assert page.one(within=running, class_="worker").text == "mac"
    assert "Stopping" in cards["stopping"].text
    assert re.search(r"waiting for \d+ s", cards["waiting"].text)

    video = page.one("video", cards["done"])
    assert video["src"] == f"page/clips/{item['done']['id']}.mp4"
    assert video["poster"] == f"page/photos/{item['done']['photo_id']}.jpg"
    assert {"controls", "loop", "playsinline"} <= video.keys()
    assert video["preload"] == "none"
    assert page.one(within=cards["done"], class_="price").text == "$0.25"
    assert page.one("a", cards["done"], download=True)["href"] == f"{video['src']}?download"
    assert page.one("p", cards["failed"], class_="error").text == "the engine <b>stopped</b>"
    assert "Retry puts it back" in cards["failed"].text

    assert page.one("title").text == "2 running · i2v"
    counted = {it["data-count"]: it.text for it in page.all(data_count=True)}
    assert counted == {"all": "6", "pending": "1", "processing": "2", "completed": "1", "failed": "1", "cancelled": "1"}


def test_in_korean(site):
    """By what the browser wants, and from then on by what was chosen."""
    item = site.add("할머니.jpg")
    site.lease(item)
    site.beat(item, "render", 0.2)
    page = site.page(**KOREAN)
    assert page.one("html")["lang"] == "ko"
    assert "사진을 여기에 놓으세요" in page.one(id="drop").text
    assert page.one(class_="stage").text == "그리는 중"
    assert page.one("title").text == "1개 진행 중 · i2v"
    assert [link["hreflang"] for link in page.all("a", hreflang=True)] == ["en", "ko"]

    answer = site.client.get("/?lang=en", headers=KOREAN)
    assert '<html lang="en">' in answer.text
    assert "Path" not in answer.headers["set-cookie"]  # it counts where the browser sees the page
    assert site.page(**KOREAN).one("html")["lang"] == "en"
    assert "set-cookie" not in site.client.get("/?lang=xx").headers


def test_what_people_type_stays_text(site):
    """Names, prompts, groups, errors and workers' names come from strangers."""
    item = site.add(f"{HOSTILE}.jpg", prompt=HOSTILE, group=HOSTILE)
    other = site.add("b.jpg", group=HOSTILE)
    site.fail(item, HOSTILE)
    site.lease(other, f"{HOSTILE}.1")
    site.beat(other, HOSTILE, 0.1, f"{HOSTILE}.1")
    page = site.page(f"/?group={item['group_id']}")
    assert len(page.all("script")) == 1
    assert all(image.get("onerror") is None for image in page.all("img"))
    assert page.one("h3").text == HOSTILE
    assert HOSTILE in page.one(class_="prompt", title=HOSTILE).text
    assert page.one(class_="stage").text == HOSTILE


def test_every_part_of_the_page_may_only_do_what_it_needs(site):
    """The browser is told to load, frame and send nothing else; and nothing is written into the page itself."""
    item = site.add()
    for address in ("/", "/page/list", "/page/summary", f"/page/tasks/{item['id']}", "/sign-in", "/page/clips/x.mp4"):
        headers = site.client.get(address).headers
        for name, value in HEADERS.items():
            assert headers[name] == value, (address, name)
        assert headers["x-content-type-options"] == "nosniff"
    page = site.page()
    for element in page.elements:
        assert "style" not in element, element
        assert not [name for name in element if name.startswith("on")], element
        for name in ("src", "href", "action", "poster"):
            address = element.get(name, "")
            assert not re.match(r"[a-z]+:|//|/", address), (element.name, address)  # relative: it may be behind a proxy
    rules = HEADERS["content-security-policy"].split("; ")
    assert {"default-src 'none'", "base-uri 'none'", "frame-ancestors 'none'", "form-action 'self'"} <= set(rules)
    assert all(rule.endswith((" 'self'", " 'none'")) for rule in rules)
    assert HEADERS["referrer-policy"] == "same-origin"  # or browsers would hide which site a form comes from
    # The page that describes the API keeps its own rules.
    assert "'unsafe-inline'" in site.client.get("/docs").headers["content-security-policy"]


def test_what_the_page_loads_is_there_and_may_be_kept(site):
    """By the digest in its address, so that a new version is loaded at once."""
    page = site.page()
    loaded = [
        page.one("link", rel="stylesheet")["href"],
        page.one("script")["src"],
        page.one("link", rel="icon")["href"],
    ]
    for address, media_type in zip(loaded, ("text/css", "text/javascript", "image/svg+xml"), strict=True):
        answer = site.client.get(address)
        assert answer.headers["content-type"].partition(";")[0] == media_type
        assert "immutable" in answer.headers["cache-control"]
        assert site.client.get(address.partition("?")[0]).headers["cache-control"] == "no-cache"
    assert site.client.get("/page/static/words.py").status_code == 404
    assert site.client.get("/page/static/..%2Fwords.py").status_code == 404
    json.loads(page.one("body")["data-words"])


def test_without_a_script_forms_do_it(site):
    """Cancel, retry and delete lead back to where the form was."""
    item = site.add(group="holiday")
    address = f"/?status=pending&group={item['group_id']}"
    page = site.page(address)
    for verb, status in (("cancel", "cancelled"), ("retry", "pending")):
        form = next(it for it in page.all("form") if it.get("action", "").partition("?")[0].endswith(f"/{verb}"))
        assert form["method"] == "post"
        answer = site.client.post(f"/{form['action']}")
        assert answer.status_code == 303
        back = answer.headers["location"]
        assert back.startswith("../../../?status=")
        assert back.endswith(f"#task-{item['id']}")
        assert str(answer.url.join(back)).startswith("http://127.0.0.1:8000/?status=")
        assert site.client.get(f"/api/tasks/{item['id']}").json()["data"]["status"] == status
        page = site.page(f"/?status={status}")
    site.client.post(f"/page/tasks/{item['id']}/cancel")
    answer = site.client.post(f"/page/tasks/{item['id']}/delete")
    assert (answer.status_code, answer.headers["location"]) == (303, "../../../")
    assert site.client.get(f"/api/tasks/{item['id']}").status_code == 404


def test_with_the_script_actions_answer_the_card(site):
    """And refusals are a line of text that says why."""
    item = site.add()
    answer = site.client.post(f"/page/tasks/{item['id']}/cancel", headers=FRAGMENT)
    [card] = Page(answer.text).cards().values()
    assert card["data-status"] == "cancelled"
    answer = site.client.post(f"/page/tasks/{item['id']}/retry", headers=FRAGMENT)
    assert Page(answer.text).one("article")["data-status"] == "pending"
    site.complete(item)
    for verb in ("cancel", "retry"):
        answer = site.client.post(f"/page/tasks/{item['id']}/{verb}", headers=FRAGMENT)
        assert (answer.status_code, answer.headers["content-type"]) == (409, "text/plain; charset=utf-8")
        assert "completed" in answer.text
    assert site.client.post(f"/page/tasks/{item['id']}/delete", headers=FRAGMENT).status_code == 204
    for verb in ("cancel", "retry", "delete"):
        assert site.client.post(f"/page/tasks/{item['id']}/{verb}", headers=FRAGMENT).status_code == 404


def test_errors_are_pages_for_people(site):
    """In their language, with a way back."""
    answer = site.client.get("/page/clips/nothing.mp4", headers=KOREAN)
    page = Page(answer.text)
    assert answer.status_code == 404
    assert page.one("h1").text == "이 페이지를 보여 줄 수 없습니다"
    assert str(answer.url.join(page.one("a")["href"])) == "http://127.0.0.1:8000/"
    assert str(answer.url.join(page.one("link", rel="stylesheet")["href"])).startswith(
        "http://127.0.0.1:8000/page/static/"
    )
    item = site.add()
    site.complete(item)
    answer = site.client.post(f"/page/tasks/{item['id']}/retry")
    assert answer.status_code == 409
    assert "only a failed or cancelled one" in answer.text


def test_a_database_that_does_not_answer_is_told(tmp_path):
    """The status that the API would answer, and the reason, in place of a bare error."""
    with app_client(config(tmp_path), authorization=f"Worker {KEY}") as client:
        with closing(sqlite3.connect(tmp_path / "queue.db")) as database:
            database.execute("ALTER TABLE video_items RENAME TO elsewhere")
            database.commit()
        answer = client.get("/")
        assert answer.status_code == client.get("/api/tasks").status_code == 500
        assert Page(answer.text).one("h1").text == "This page cannot be shown"
        assert client.get("/page/summary", headers=FRAGMENT).status_code == 500


def test_a_card_changes_its_version_with_what_it_shows(site):
    """Progress moves without a new card, so that the page keeps what it has; everything else is a new version."""
    item = site.add()

    def version():
        return site.page(f"/page/tasks/{item['id']}").one("article")["data-version"]

    seen = [version()]
    site.lease(item)
    seen.append(version())
    site.beat(item, "denoise", 0.3)
    assert version() == seen[-1]
    site.beat(item, "denoise", 0.6)
    assert version() == seen[-1]
    site.client.post(f"/api/tasks/{item['id']}/cancel")
    seen.append(version())
    assert len(set(seen)) == 3


def test_groups(site):
    """Photos of one group stand together, with their counts; photos that came alone have no head."""
    alone = site.add("alone.jpg")
    first = site.add("one.jpg", group="Jeju <3")
    second = site.add("two.jpg", group="Jeju <3")
    site.add("last.jpg")
    site.complete(first)
    page = site.page()
    sections = page.all("section", class_="group")
    assert [[card["data-name"] for card in page.all("article", section)] for section in sections] == [
        ["last.jpg"],
        ["two.jpg", "one.jpg"],
        ["alone.jpg"],
    ]
    head = page.one("header", class_="head")
    assert page.one("h3", head).text == "Jeju <3"
    assert "2 clips" in head.text
    assert "Waiting: 1" in head.text
    assert "Done: 1" in head.text
    links = [link["href"] for link in page.all("a", head)]
    assert links == [f"./?group={first['group_id']}", f"page/groups/{first['group_id']}/clips.zip"]

    only = site.page(f"/?group={first['group_id']}")
    assert list(only.cards()) == ["two.jpg", "one.jpg"]
    assert only.one(data_count="all").text == "2"
    assert only.one(data_count="completed").text == "1"
    assert only.one("a", data_status="failed")["href"] == f"./?status=failed&group={first['group_id']}"
    assert only.one("a", class_="all-groups")["href"] == "./"

    heads = site.page(f"/page/summary?head={second['group_id']}&head={alone['group_id']}&head=gone")
    assert [head["data-head"] for head in heads.all("header")] == [second["group_id"], alone["group_id"]]


def test_filters(site):
    """By state; one that is not understood shows everything."""
    one, two = site.add("one.jpg"), site.add("two.jpg")
    site.complete(one)
    page = site.page("/?status=completed")
    assert list(page.cards()) == ["one.jpg"]
    assert page.one("a", data_status="completed")["aria-current"] == "page"
    assert "aria-current" not in page.one("a", data_status="")
    assert list(site.page("/?status=pending").cards()) == ["two.jpg"]
    assert "Nothing here" in site.page("/?status=failed").one(class_="empty").text
    for nonsense in ("status=everything", "before=%00", "group=" + "x" * 1000, "status=completed&status=x%22"):
        assert site.client.get(f"/?{nonsense}").status_code == 200
    assert len(site.page("/?status=everything").cards()) == 2
    older = site.page(f"/page/list?before={two['id']}")
    assert list(older.cards()) == ["one.jpg"]
    assert older.one("form")["action"].endswith(f"/delete?before={two['id']}")  # it leads back to the same part


def test_a_long_list_comes_in_pages(tmp_path):
    """The list is as long as one page, whatever waits behind it, and each task is on exactly one."""
    with app_client(config(tmp_path), authorization=f"Worker {KEY}") as client:
        store = Store(f"sqlite:///{tmp_path / 'queue.db'}")
        for _ in range(10):
            group = new_id()
            for _ in range(5):
                store.add(NewPhoto(group, f"{group}/p_original.jpg"), [NewItem() for _ in range(20)])
        store.close()
        seen, address = [], "/page/list"
        for _ in range(30):
            page = Page(client.get(address).text)
            cards = [card["data-id"] for card in page.all("article")]
            assert len(cards) <= PAGE_SIZE
            seen += cards
            older = page.all("a", rel="next")
            if not older:
                break
            address = "/page/list" + older[0]["href"].removeprefix("./")
        assert len(seen) == len(set(seen)) == 1000
        assert seen == sorted(seen, reverse=True)
        assert Page(client.get("/").text).one(data_count="pending").text == "1,000"


def test_the_strip(site):
    """Waits, clips an hour, money with what is not known of it, and workers."""
    for number, cost in enumerate((0.25, 1.5, None)):
        item = site.add(f"{number}.jpg")
        site.complete(item, f"mac.{number}", **({} if cost is None else {"cost_usd": cost}))
    site.lease(site.add("now.jpg"), "box.1")
    site.add("next.jpg")
    page = site.page("/page/summary")
    facts = dict(zip((it.text for it in page.all("dt")), (it.text for it in page.all("dd")), strict=True))
    heard = r"(just now|\d+ s ago)"
    assert re.fullmatch(rf"box 1 clip, {heard} mac idle, {heard}", facts.pop("Workers"))
    assert re.fullmatch(r"\d+ s", facts.pop("Longest wait"))
    assert re.fullmatch(r"\d+ s", facts.pop("All done in"))  # as long as those before took
    assert facts == {"Clips in the last hour": "3", "Spent today (UTC)": "$1.75 + 1 clip without a known price"}


def test_tasks_without_any_worker_are_told(site):
    """The page says what is missing, and how it is started."""
    site.add()
    assert site.page().one(class_="notice").text.endswith("i2v work --url http://127.0.0.1:8000")
    site.client.post("/api/worker/next-task", json={"worker_id": "mac.1"})
    site.add()
    assert not site.page().all(class_="notice")


@pytest.mark.parametrize(
    "message,words",
    [
        (CRASHED, "Each worker that tried this went silent."),
        ("the photo is only 8x8 pixels", "add another photo"),
        ("its moderation refused the photo or the prompt (SAFETY.INPUT)", "was refused"),
        ("safetensors: the file is damaged", "Retry puts it back"),
    ],
)
def test_a_failure_says_what_to_do(site, message, words):
    """Depending on what the worker said."""
    site.fail(site.add(), message)
    page = site.page()
    [card] = page.cards().values()
    assert words in page.one("p", card, class_="hint").text


def test_a_long_error_folds(site):
    """A worker may send all of its stderr."""
    message = "Traceback (most recent call last):\n" + "  line\n" * 400
    site.fail(site.add(), message)
    page = site.page()
    assert page.one("details").text.startswith("Traceback (most recent call last): line")
    assert page.one("pre").text.count("line") == 400


def test_pictures_are_small_upright_jpegs(site):
    """Of any photo that is accepted, and the browser may keep them."""
    file = BytesIO()
    picture = Image.new("RGB", (2400, 1200), "teal")
    picture.save(file, "JPEG", exif=_sideways(picture))
    item = site.add(photo=file.getvalue())
    answer = site.client.get(f"/page/photos/{item['photo_id']}.jpg")
    assert answer.headers["content-type"] == "image/jpeg"
    assert "immutable" in answer.headers["cache-control"]
    assert "private" in answer.headers["cache-control"]
    shown = Image.open(BytesIO(answer.content))
    assert (shown.format, shown.size) == ("JPEG", (320, 640))
    assert not shown.getexif()
    assert site.client.get("/page/photos/nothing.jpg").status_code == 404


def test_heic_is_shown_as_jpeg(site):
    """Phones send HEIC, and most browsers cannot show it."""
    import pillow_heif

    file = BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (800, 600), "purple")).save(file)
    item = site.add("IMG_1.HEIC", file.getvalue())
    shown = Image.open(BytesIO(site.client.get(f"/page/photos/{item['photo_id']}.jpg").content))
    assert (shown.format, shown.size) == ("JPEG", (640, 480))


def _sideways(picture):
    exif = picture.getexif()
    exif[0x0112] = 6
    return exif


def test_clips_are_served_in_ranges_and_saved_under_their_photos_name(site):
    """A browser asks for ranges to play, and people find their files by the photo."""
    item = site.add("가족 여행.jpg")
    address = f"/page/clips/{item['id']}.mp4"
    assert site.client.get(address).status_code == 404
    site.complete(item)
    answer = site.client.get(address, headers={"range": "bytes=4-7"})
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (206, b"ftyp", "video/mp4")
    assert answer.headers["content-disposition"].startswith("inline")
    answer = site.client.get(f"{address}?download")
    assert answer.content == CLIP
    name = "%EA%B0%80%EC%A1%B1%20%EC%97%AC%ED%96%89.mp4"
    assert answer.headers["content-disposition"] == f"attachment; filename*=utf-8''{name}"


def test_all_clips_of_a_group_are_one_archive(site, tmp_path):
    """Stored, each under a name of its own; what is not done or not there any more is left out."""
    items = [site.add(name, group="여행/2019") for name in ("가족.jpg", "가족.jpg", "../x.png", "y.jpg", "z.jpg")]
    for item in items[:4]:
        site.complete(item)
    (tmp_path / "objects" / "videos" / f"{items[3]['id']}.mp4").unlink()
    answer = site.client.get(f"/page/groups/{items[0]['group_id']}/clips.zip")
    assert answer.headers["content-type"] == "application/zip"
    assert answer.headers["content-disposition"].endswith("%EC%97%AC%ED%96%89_2019.zip")
    with zipfile.ZipFile(BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["가족.mp4", "가족 (2).mp4", "x.mp4"]
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.read("x.mp4") == CLIP
    assert "not in storage any more" in site.page().cards()["y.jpg"].text
    assert site.client.get("/page/groups/nothing/clips.zip").status_code == 404


def test_the_page_is_no_part_of_the_described_api(site):
    """Programs use the API; the page may change with every version."""
    described = site.client.get("/openapi.json").json()["paths"]
    assert not [path for path in described if not path.startswith(("/api/", "/storage/", "/healthz"))]


def test_a_small_photo_is_not_made_larger(site):
    """A picture has at most the pixels of its photo."""
    item = site.add(photo=jpeg(64, 48))
    shown = Image.open(BytesIO(site.client.get(f"/page/photos/{item['photo_id']}.jpg").content))
    assert shown.size == (64, 48)
