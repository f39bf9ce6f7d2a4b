"""How the page looks and how it is used: languages, themes, widths, keyboards, and those who hear it."""

import io

import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.browser import screenshot
from tests.browser.gallery import furnish
from tests.browser.photos import jpeg
from tests.browser.queue_process import QueueProcess
from tests.browser.visit import WAIT_MS

LOCALES = ("en-GB", "ko-KR")

CUT = """
() => [...document.querySelectorAll("button, a, label, h1, h2, h3, nav *, #summary *")]
  .filter(element => element.checkVisibility() && element.clientWidth > 1 && element.children.length === 0
    && element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).display !== "inline"
    && getComputedStyle(element).textOverflow !== "ellipsis")
  .map(element => element.outerHTML.slice(0, 160))
"""
"""Elements whose text is wider than they are."""


@pytest.fixture(scope="module")
def shop(browser, tmp_path_factory):  # noqa: ARG001 - without a browser, no queue
    """A queue with something of every kind; nobody changes it."""
    with QueueProcess(tmp_path_factory.mktemp("shop")) as queue:
        queue.gallery = furnish(queue)
        yield queue


@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_stands_in_the_way_of_assistive_technology(shop, visit, locale, dark):
    """axe-core finds nothing serious: names, roles, contrast, language, landmarks; also while a dialog is open."""
    seen = visit(shop, locale=locale, dark=dark)
    seen.expect_connection("live")
    assert seen.axe() == []
    assert seen.page.locator("html").get_attribute("lang") == locale[:2]
    red, green, blue = seen.background()
    assert max(red, green, blue) < 80 if dark else min(red, green, blue) > 175
    seen.act(shop.gallery.failed, "delete")
    expect(seen.page.locator("dialog[open]")).to_be_visible()
    assert seen.axe() == []


@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.parametrize("width", [320, 390, 820])
def test_it_fits_every_screen(shop, visit, width, locale):
    """No sideways scrolling, no text that is cut, and what is to be pressed can be."""
    seen = visit(shop, locale=locale, width=width, height=844, has_touch=width < 800, is_mobile=width < 800)
    seen.wait_for_pictures()
    assert seen.overflow_px() <= 0
    assert seen.page.evaluate(CUT) == []
    if width <= 390:
        for button in seen.page.locator("button:visible, input[type=submit]:visible").all():
            box = button.bounding_box()
            assert box["height"] >= 24  # WCAG 2.2, 2.5.8
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width


def test_korean_is_korean(shop, visit):
    """By the browser's language; states, buttons and numbers are in it, and no English is left over."""
    seen = visit(shop, locale="ko-KR")
    body = seen.page.locator("body").inner_text()
    for english in ("Cancel", "Delete", "Retry", "Waiting", "Download", "Prompt", "seconds left"):
        assert english not in body, english
    assert "취소" in body
    for hangul in ("할머니 댁 앞마당에서.jpg", "바람에 나뭇잎이 흔들린다"):
        assert hangul in body


def test_the_language_can_be_chosen(shop, visit):
    """Whatever the browser asks for; the choice is kept for the next visit."""
    seen = visit(shop, locale="ko-KR")
    seen.page.locator('a[hreflang="en"]').click()
    expect(seen.page.locator("html")).to_have_attribute("lang", "en")
    seen.page.goto(shop.url)
    expect(seen.page.locator("html")).to_have_attribute("lang", "en")


def test_a_keyboard_is_enough(queue, visit, tmp_path):
    """Tab by Tab a photo is chosen, the form filled in and sent, and the task cancelled. The focus is always seen."""
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(jpeg(0, 240, 160))
    seen = visit(queue)
    page = seen.page

    def tab_to(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                assert page.evaluate(
                    """() => {
                      const styles = [document.activeElement, document.activeElement.closest("label, #drop, .task")]
                        .filter(Boolean).map(element => getComputedStyle(element));
                      return styles.some(it => it.outlineStyle !== "none" || it.boxShadow !== "none");
                    }"""
                ), f"the focus on {selector} does not show"
                return
        raise AssertionError(f"no way to {selector} by Tab")

    tab_to("#photos, #drop, #drop button, button[data-action=choose]")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space" if page.evaluate("document.activeElement.matches('input')") else "Enter")
    chooser.value.set_files(photo)
    tab_to("#prompt")
    page.keyboard.type("zoom out")
    tab_to("#seconds")
    tab_to("#submit")
    page.keyboard.press("Enter")
    expect(seen.cards).to_have_count(1, timeout=WAIT_MS)
    [task] = queue.tasks()
    assert task["prompt"] == "zoom out"
    tab_to("button[data-action=cancel]")
    page.keyboard.press("Enter")
    seen.expect_status(task["id"], "cancelled")


def test_it_can_be_read_without_scripts(shop, visit):
    """Cards, states and counts are in the HTML; a form does what a button would."""
    seen = visit(shop, java_script_enabled=False)
    expect(seen.cards).to_have_count(9)
    item_id = shop.submit(jpeg(0, 120, 80))
    seen.page.goto(shop.url)
    seen.act(item_id, "cancel")
    expect(seen.card(item_id)).to_have_attribute("data-status", "cancelled")
    shop.ask("DELETE", f"tasks/{item_id}")


def test_an_empty_queue_says_what_to_do(queue, visit):
    """In both languages, and axe has nothing against it."""
    for locale in LOCALES:
        seen = visit(queue, locale=locale)
        expect(seen.cards).to_have_count(0)
        assert len(seen.page.locator("main").inner_text()) > 60
        assert seen.axe() == []
        assert seen.overflow_px() <= 0


def test_little_moves_for_those_who_ask_for_it(shop, visit):
    """With prefers-reduced-motion nothing is animated for long."""
    seen = visit(shop, reduced_motion="reduce")
    moving = seen.page.evaluate(
        "document.getAnimations().filter(it => it.effect.getComputedTiming().duration > 100).length"
    )
    assert moving == 0


def test_the_description_of_the_api_opens(shop, visit):
    """Swagger UI lists the routes, with nothing from elsewhere and no error in the console."""
    seen = visit(shop, "docs")
    expect(seen.page.locator("#ui .opblock").first).to_be_visible(timeout=WAIT_MS)


def test_the_picture_in_the_readme_can_be_made(shop, browser):
    """As it was made for docs/page.png, which is there and small."""
    for picture in (screenshot.take(browser, shop), screenshot.PICTURE.read_bytes()):
        assert len(picture) <= screenshot.MAX_BYTES
        with Image.open(io.BytesIO(picture)) as image:
            assert image.size == (screenshot.WIDTH, screenshot.HEIGHT)
