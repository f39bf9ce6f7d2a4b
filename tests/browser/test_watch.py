"""What the other tests lean on: the watch sees what goes wrong, and this browser drops files and plays clips."""

import base64
import re

import pytest

from tests.browser.other_site import other_site
from tests.browser.queue_process import clip
from tests.browser.visit import PLAYING, WAIT_MS
from tests.support.browser import Watch

WRONG = [
    ("<script>console.error('so this happened')</script>", "console: so this happened"),
    ("<script>throw new Error('nobody caught it')</script>", "exception: nobody caught it"),
    ("<script>Promise.reject(new Error('nor this'))</script>", "exception: nor this"),
    ("<img src='http://example.invalid/a.png'>", "request to another host: http://example.invalid/a.png"),
    ("<img src='http://127.0.0.1:1/b.png'>", "request failed: GET http://127.0.0.1:1/b.png"),
    (
        "<meta http-equiv='Content-Security-Policy' content=\"script-src 'none'\"><script>1</script>",
        "violates the following Content Security Policy",
    ),
]


@pytest.fixture
def open_html(browser):
    """Opens a page of our own making; gives the page and its watch."""
    with browser.new_context() as context:

        def open_page(port):
            watch = Watch(context, f"127.0.0.1:{port}")
            page = context.new_page()
            page.goto(f"http://127.0.0.1:{port}/")
            return page, watch

        yield open_page


@pytest.mark.parametrize("html, problem", WRONG, ids=[problem for _, problem in WRONG])
def test_what_goes_wrong_is_seen(open_html, html, problem):
    """Each kind of trouble is found, until it is expected by name."""
    with other_site(html) as port:
        page, watch = open_html(port)
        page.wait_for_timeout(100)  # a promise that nobody holds is told of in the next turn of the loop
        assert any(problem in found for found in watch.problems()), watch.found
        watch.expect(re.escape(problem))
        assert not any(problem in found for found in watch.problems())


def test_a_file_is_dropped_and_a_clip_plays(open_html, tmp_path):
    """Files arrive as from a file manager, and H.264 plays without a codec of anybody's."""
    (tmp_path / "b.txt").write_text("dropped")
    video = base64.b64encode(clip()).decode()
    html = f"""<body style="height: 300px">
      <video muted autoplay loop src="data:video/mp4;base64,{video}"></video><script>
      ondragover = event => event.preventDefault();
      ondrop = async event => {{ event.preventDefault(); window.got = await event.dataTransfer.files[0].text(); }};
    </script>"""
    with other_site(html) as port:
        page, watch = open_html(port)
        session = page.context.new_cdp_session(page)
        data = {"items": [], "files": [str(tmp_path / "b.txt")], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            session.send("Input.dispatchDragEvent", {"type": kind, "x": 50, "y": 50, "data": data})
        page.wait_for_function("window.got === 'dropped'", timeout=WAIT_MS)
        page.wait_for_function(PLAYING, arg=page.locator("video").element_handle(), timeout=WAIT_MS)
        assert watch.problems() == []
