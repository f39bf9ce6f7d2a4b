"""The picture of the page that the README shows: `python -m tests.browser.screenshot` writes docs/page.png."""

import io
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser

from tests.browser.gallery import furnish
from tests.browser.queue_process import QueueProcess
from tests.browser.visit import Visit
from tests.support.browser import running_browser

PICTURE = Path(__file__).parents[2] / "docs" / "page.png"
WIDTH, HEIGHT = 1200, 1290  # pixels
MAX_BYTES = 300_000
COLOURS = 256


def take(browser: Browser, queue: QueueProcess) -> bytes:
    """A PNG of the page at a queue that was furnished, small enough for a repository."""
    with Visit(browser, queue, width=WIDTH, height=HEIGHT) as seen:
        seen.expect_connection("live")
        seen.wait_for_pictures()
        seen.page.evaluate("scrollTo(0, 0)")
        seen.page.wait_for_timeout(800)  # a player turns a wheel while it looks at its poster
        shot = Image.open(io.BytesIO(seen.page.screenshot(animations="disabled", caret="hide")))
        assert seen.watch.problems() == []
    file = io.BytesIO()
    shot = shot.convert("RGB")
    shot.quantize(palette=shot.quantize(COLOURS), dither=Image.Dither.FLOYDSTEINBERG).save(file, "PNG", optimize=True)
    return file.getvalue()


def main() -> None:
    """Writes the file."""
    with (
        tempfile.TemporaryDirectory() as folder,
        QueueProcess(Path(folder)) as queue,
        running_browser() as browser,
    ):
        furnish(queue, took_s=52)
        picture = take(browser, queue)
    PICTURE.write_bytes(picture)
    print(f"{PICTURE}: {len(picture) // 1000} kB")


if __name__ == "__main__":
    main()
