"""One visitor of the page: a context of the browser, and what is done there again and again."""

import io
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any, Self

from PIL import Image
from playwright.sync_api import Browser, Locator, expect

from tests.browser.queue_process import QueueProcess
from tests.browser.under_a_path import Place
from tests.support.browser import Watch

WAIT_MS = 15_000
"""How long whatever is awaited may take on a busy machine."""

expect.set_options(timeout=WAIT_MS)

AWAY = "ERR_CONNECTION_REFUSED|ERR_INCOMPLETE_CHUNKED|ERR_CONNECTION_RESET|ERR_EMPTY_RESPONSE"
"""What the console says while a server is away."""

RECORDER = """
window.seen = {};
new MutationObserver(() => {
  for (const card of document.querySelectorAll("article.task[data-id]")) {
    const list = window.seen[card.dataset.id] ??= [];
    const bar = card.querySelector("progress");
    if (bar && bar.hasAttribute("value")) {
      const percent = Math.round(100 * bar.value / bar.max);
      if (list.at(-1) !== percent) list.push(percent);
    }
  }
}).observe(document, {subtree: true, childList: true, attributes: true});
"""
"""Keeps what each task's bar has shown: {id: [percent, …]}, without repetitions."""

PLAYING = """
video => !video.paused && video.readyState === 4 && video.currentTime > 0.15
  && video.getVideoPlaybackQuality().totalVideoFrames > 3
"""


class Visit:
    """A page that is open, and its watch."""

    def __init__(
        self,
        browser: Browser,
        queue: QueueProcess | Place,
        path: str = "",
        *,
        locale: str = "en-GB",
        width: int = 1280,
        height: int = 900,
        dark: bool = False,
        hosts: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        """`hosts`: name:port of other servers that may be asked; `options`: of the context."""
        self._context = browser.new_context(
            locale=locale,
            timezone_id="Asia/Seoul",
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            **options,
        )
        self._context.set_default_timeout(WAIT_MS)
        self._context.add_init_script(RECORDER)
        self.watch = Watch(self._context, queue.host, *hosts)
        self.page = self._context.new_page()
        self.page.goto(f"{queue.url}/{path}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()

    @property
    def cookies(self) -> list[Any]:
        """All that the context has."""
        return self._context.cookies()

    # ------------------------------------------------------------ photos

    def drop(self, *paths: Path) -> None:
        """Lets go of files over the drop zone, as a file manager does: the browser makes the events."""
        box = self.page.locator("#drop").bounding_box()
        assert box is not None
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        session = self._context.new_cdp_session(self.page)
        for kind in ("dragEnter", "dragOver", "drop"):
            session.send("Input.dispatchDragEvent", {"type": kind, **place, "data": data})
        session.detach()

    def choose(self, *paths: Path) -> None:
        """Chooses files by the file dialog."""
        self.page.locator("#photos").set_input_files([str(path) for path in paths])

    def submit(self, prompt: str = "", seconds: float | None = None) -> None:
        """Fills in the form and sends it."""
        if prompt:
            self.page.locator("#prompt").fill(prompt)
        if seconds is not None:
            self.page.locator("#seconds").fill(f"{seconds:g}")
        self.page.locator("#submit").click()

    # ------------------------------------------------------------ cards

    @property
    def cards(self) -> Locator:
        """The cards of all tasks on this page."""
        return self.page.locator("article.task")

    def card(self, item_id: str) -> Locator:
        """The card of one."""
        return self.page.locator(f'article.task[data-id="{item_id}"]')

    def expect_status(self, item_id: str, status: str, timeout_ms: float = WAIT_MS) -> None:
        """Waits until a card says so."""
        expect(self.card(item_id)).to_have_attribute("data-status", status, timeout=timeout_ms)

    def expect_count(self, status: str, count: int) -> None:
        """Waits until the summary counts so many."""
        expect(self.page.locator(f'#summary [data-count="{status}"]').first).to_have_text(str(count), timeout=WAIT_MS)

    def expect_connection(self, state: str, timeout_ms: float = WAIT_MS) -> None:
        """Waits until the page says whether it hears from the server: live or lost."""
        expect(self.page.locator("#connection")).to_have_attribute("data-state", state, timeout=timeout_ms)

    def act(self, item_id: str, action: str) -> None:
        """Presses a button of a card: cancel, retry or delete."""
        self.card(item_id).locator(f'button[data-action="{action}"]').click()

    def percents(self) -> dict[str, list[int]]:
        """What the bars have shown since the page was loaded."""
        return self.page.evaluate("window.seen")

    def play(self, item_id: str) -> None:
        """Starts a clip from the keyboard; returns once frames are shown."""
        video = self.card(item_id).locator("video")
        video.scroll_into_view_if_needed()
        video.focus()
        self.page.keyboard.press("Space")
        self.wait_for(lambda: video.evaluate(PLAYING), "the clip plays")

    def confirm(self) -> None:
        """Says yes to the dialog that is open."""
        self.page.locator("dialog[open] button[value=yes], dialog[open] button.danger").first.click()

    def expect_percent(self, item_id: str, percent: int) -> None:
        """Waits until a bar shows so much."""
        bar = self.card(item_id).locator("progress")
        self.wait_for(lambda: bar.evaluate("bar => Math.round(100 * bar.value / bar.max)") == percent, f"{percent} %")

    def wait_for_pictures(self) -> None:
        """Until every picture on the page has arrived and could be decoded."""
        for picture in self.page.locator("article.task img").all():
            picture.scroll_into_view_if_needed()
        arrived = "[...document.querySelectorAll('article.task img')].every(image => image.naturalWidth > 0)"
        self.wait_for(lambda: self.page.evaluate(arrived), "all pictures are there")

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Asks again and again until the answer is true. Playwright's own way uses eval(), which the page forbids."""
        give_up_at = monotonic() + WAIT_MS / 1000
        while not condition():
            assert monotonic() < give_up_at, f"not within {WAIT_MS / 1000:g} s: {what}"
            self.page.wait_for_timeout(50)

    # ------------------------------------------------------------ looks

    def background(self) -> tuple[int, int, int]:
        """The colour of the page's left upper corner."""
        shot = self.page.screenshot(clip={"x": 0, "y": 0, "width": 2, "height": 2})
        with Image.open(io.BytesIO(shot)) as corner:
            return corner.convert("RGB").getpixel((0, 0))

    def overflow_px(self) -> int:
        """How much wider the page is than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def axe(self) -> list[str]:
        """What axe-core finds serious or critical, one line each."""
        from axe_playwright_python.base import AXE_SCRIPT

        self.page.evaluate(AXE_SCRIPT)
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        return [
            f"{rule['id']}: {node['html'][:200]}: {node.get('failureSummary', '')[:300]}"
            for rule in found
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        ]
