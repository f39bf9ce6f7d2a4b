"""A signed-in browser that visits somebody else's page: what that page can do to the queue is nothing."""

import pytest
from playwright.sync_api import expect

from tests.browser.other_site import other_site
from tests.browser.queue_process import QueueProcess
from tests.browser.visit import AWAY, WAIT_MS

KEY = "key-of-the-browser-tests"

REFUSED = "Failed to load resource|CORS policy|ERR_FAILED|ERR_BLOCKED|WebSocket connection|frame|MIME type"
"""How a browser tells that it kept a page from something: each attempt below has its line in the console."""

ATTACK = """<!doctype html><title>elsewhere</title>
<form id="form" method="post" target="sink" action="%(url)s/page/tasks/%(id)s/cancel"><input name="x" value="1"></form>
<form id="api" method="post" target="sink" action="%(url)s/api/tasks/%(id)s/cancel" enctype="text/plain"></form>
<iframe name="sink"></iframe>
<script>
const url = "%(url)s", id = "%(id)s";
const options = {credentials: "include"};
const attempt = async (name, what) => {
  try { return [name, await what()]; } catch (error) { return [name, "refused"]; }
};
const read = async (path, more) => {
  const answer = await fetch(url + path, {...options, ...more});
  return `read ${answer.status} ${(await answer.text()).slice(0, 80)}`;
};
const blind = path => fetch(url + path, {...options, method: "POST", mode: "no-cors"}).then(() => "sent blindly");
const heard = source => new Promise(resolve => {
  source.onmessage = event => resolve("heard " + event.data);
  source.onopen = () => resolve("open");
  source.onerror = () => { source.close(); resolve("refused"); };
});
const shown = (tag, path) => new Promise(resolve => {
  const element = document.body.appendChild(document.createElement(tag));
  element.onload = element.onloadeddata = () => resolve("shown");
  element.onerror = () => resolve("refused");
  element.src = url + path;
});
window.attack = async () => {
  document.getElementById("form").submit();
  document.getElementById("api").submit();
  const form = new FormData();
  form.append("photo", new Blob(["x"]), "a.jpg");
  return Object.fromEntries(await Promise.all([
    attempt("read tasks", () => read("/api/tasks")),
    attempt("read page", () => read("/")),
    attempt("read card", () => read(`/page/tasks/${id}`)),
    attempt("cancel", () => read(`/api/tasks/${id}/cancel`, {method: "POST"})),
    attempt("delete", () => read(`/api/tasks/${id}`, {method: "DELETE"})),
    attempt("add", () => read("/api/tasks", {method: "POST", body: form})),
    attempt("token", () => read("/api/events-token", {method: "POST", body: '{"project_id": "queue"}'})),
    attempt("blind cancel", () => blind(`/api/tasks/${id}/cancel`)),
    attempt("blind form", () => blind(`/page/tasks/${id}/delete`)),
    attempt("sign out", () => blind("/sign-out")),
    attempt("events", () => heard(new EventSource(url + "/events/queue", {withCredentials: true}))),
    attempt("socket", () => heard(new WebSocket(url.replace("http", "ws") + "/ws/queue"))),
    attempt("photo", () => shown("img", "/page/photos/%(photo)s.jpg")),
    attempt("clip", () => shown("video", `/page/clips/${id}.mp4`)),
  ]));
};
</script>
"""


@pytest.fixture(scope="module")
def keyed(browser, tmp_path_factory):  # noqa: ARG001 - without a browser, no queue
    """A queue with a key."""
    with QueueProcess(tmp_path_factory.mktemp("keyed"), key=KEY) as queue:
        yield queue


def sign_in(seen, key):
    """Types a key and sends it."""
    seen.page.locator("#key").fill(key)
    seen.page.locator("#key").press("Enter")


@pytest.mark.parametrize("locale, dark", [("en-GB", False), ("ko-KR", True)])
def test_the_key_opens_the_page(keyed, visit, locale, dark):
    """A wrong key is told and opens nothing; the right one does, once, until signing out."""
    keyed.clear()
    item_id = keyed.submit(prompt="only for us")
    seen = visit(keyed, locale=locale, dark=dark)
    seen.watch.expect(r"status of 40[13]")  # the wrong key's answer
    expect(seen.page.locator("#key")).to_be_visible()
    assert "only for us" not in seen.page.content()
    sign_in(seen, "not the key")
    expect(seen.page.locator("[role=alert]")).to_be_visible()
    assert seen.axe() == []
    assert "i2v_session" not in {cookie["name"] for cookie in seen.cookies}
    sign_in(seen, KEY)
    expect(seen.card(item_id)).to_be_visible(timeout=WAIT_MS)
    [cookie] = [cookie for cookie in seen.cookies if cookie["name"] == "i2v_session"]
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    seen.page.reload()
    expect(seen.card(item_id)).to_be_visible(timeout=WAIT_MS)
    seen.expect_connection("live")
    seen.page.locator("form[action=sign-out] button").click()
    expect(seen.page.locator("#key")).to_be_visible()
    seen.page.goto(keyed.url)
    expect(seen.page.locator("#key")).to_be_visible()
    assert "only for us" not in seen.page.content()


def test_a_session_outlives_the_server_and_not_the_key(visit, tmp_path):
    """Started again, the server knows who is signed in; with another key it asks again, and the page leads there."""
    with QueueProcess(tmp_path, key=KEY) as queue:
        seen = visit(queue)
        seen.watch.expect(AWAY).expect(r"status of 401")
        sign_in(seen, KEY)
        seen.expect_connection("live")
        seen.page.evaluate("window.stayed = true")
        queue.kill()
        seen.expect_connection("lost")
        queue.start()
        seen.expect_connection("live")
        assert seen.page.evaluate("window.stayed")
        queue.kill()
        queue.start(key="another-key")
        expect(seen.page.locator("#key")).to_be_visible(timeout=WAIT_MS)


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_page_from_elsewhere_can_do_nothing(keyed, visit, name):
    """From another port of the same host the cookie comes along, from another name it does not: both are refused."""
    keyed.clear()
    item_id = keyed.submit(prompt="only for us")
    photo_id = keyed.task(item_id)["photo_id"]
    seen = visit(keyed)
    sign_in(seen, KEY)
    expect(seen.card(item_id)).to_be_visible(timeout=WAIT_MS)
    html = ATTACK % {"url": keyed.url, "id": item_id, "photo": photo_id}
    with other_site(html) as port:
        seen.watch.expect(REFUSED).expect(f"another host: http://{name}:{port}/")
        elsewhere = seen.page.context.new_page()
        elsewhere.goto(f"http://{name}:{port}/")
        got = elsewhere.evaluate("attack()")
        elsewhere.close()
    may_be_sent = ("blind cancel", "blind form", "sign out")  # a page that sends without reading learns nothing
    achieved = {name: result for name, result in got.items() if result != "refused" and name not in may_be_sent}
    assert achieved == {}
    assert keyed.task(item_id)["status"] == "pending"
    assert len(keyed.tasks()) == 1
    seen.page.reload()  # still signed in, and all as it was
    expect(seen.card(item_id)).to_be_visible(timeout=WAIT_MS)
    seen.expect_status(item_id, "pending")
