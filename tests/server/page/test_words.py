"""What the page says: both languages say the same things, and nothing that is asked for is missing."""

import re
from importlib import resources
from string import Formatter

import pytest

from inference.queues.item import Status
from inference.server.page.english import ENGLISH
from inference.server.page.korean import KOREAN
from inference.server.page.views import HINTS
from inference.server.page.words import LANGUAGES, WORDS, language_of

PACKAGE = resources.files("inference.server.page")
TEMPLATES = "\n".join(file.read_text("utf-8") for file in (PACKAGE / "templates").iterdir())
SCRIPT = (PACKAGE / "static" / "page.js").read_text("utf-8")
MODULES = [file for file in PACKAGE.iterdir() if file.name.endswith(".py")]
CODE = "\n".join(
    (TEMPLATES, SCRIPT, *(file.read_text("utf-8") for file in MODULES if file.name not in ("english.py", "korean.py")))
)


def gaps(text):
    """The names of a text's gaps."""
    return {name for _, name, _, _ in Formatter().parse(text) if name}


def test_both_languages_have_the_same_keys_with_the_same_gaps():
    """A text that one language lacks would be an error of the page in that language alone."""
    assert ENGLISH.keys() == KOREAN.keys()
    for key in ENGLISH:
        assert gaps(ENGLISH[key]) == gaps(KOREAN[key]), key
        assert ENGLISH[key].strip() == ENGLISH[key] != ""
        assert KOREAN[key].strip() == KOREAN[key] != ""


def test_what_is_counted_has_both_forms():
    """`count` picks one of two keys."""
    for key in ENGLISH:
        if key.endswith((".one", ".other")):
            assert {f"{key.rpartition('.')[0]}.{form}" for form in ("one", "other")} <= ENGLISH.keys()


def test_every_text_that_is_asked_for_is_there():
    """Keys in templates and in the script; keys that are put together are asked for by what can be in their gap."""
    for key in re.findall(r'\bt\("([a-z_.]+)"[,)]', TEMPLATES):
        assert key in ENGLISH, key
    for key in re.findall(r'\bt\.count\("([a-z_.]+)"', TEMPLATES) + re.findall(r'\bcount\("([a-z_.]+)"', SCRIPT):
        assert f"{key}.one" in ENGLISH, key
    for key in ("status.all", *(f"status.{status}" for status in Status.__args__)):
        assert key in ENGLISH
    for hint in {hint for _, hint in HINTS} | {"crashed", "lost", "retry"}:
        assert f"error.{hint}" in ENGLISH


def test_the_script_gets_every_text_that_it_asks_for():
    """It has those alone that were sent along."""
    sent = WORDS["en"].for_script()
    asked = set(re.findall(r'\bsay\("([a-z_.]+)"', SCRIPT)) | set(re.findall(r'WORDS\["([a-z_.]+)"\]', SCRIPT))
    assert len(asked) > 20
    assert asked <= sent.keys()
    for state in set(re.findall(r'setUpload\(upload, "(\w+)"\)', SCRIPT)):
        assert f"upload.{state}" in sent


def test_no_text_is_left_over():
    """A text that nobody asks for is one that nobody looks after."""
    together = ("status.", "stage.", "error.", "action.", "said.")
    for key in ENGLISH:
        stem = re.sub(r"\.(one|other)$", "", key)
        states = re.findall(r'setUpload\(upload, "(\w+)"\)', SCRIPT)
        if not (key.startswith(together) or key.removeprefix("upload.") in states):
            assert f'"{stem}"' in CODE or f'"{key}"' in CODE, key


@pytest.mark.parametrize(
    "seconds,english,korean",
    [
        (-3, "0 s", "0초"),
        (0.4, "0 s", "0초"),
        (59.4, "59 s", "59초"),
        (59.6, "1 min", "1분"),
        (95, "1 min 35 s", "1분 35초"),
        (600, "10 min", "10분"),
        (754, "12 min", "12분"),
        (3600, "1 h", "1시간"),
        (7830, "2 h 10 min", "2시간 10분"),
        (86_399.7, "1 d", "1일"),
        (3 * 86_400 + 7200, "3 d 2 h", "3일 2시간"),
    ],
)
def test_durations(seconds, english, korean):
    """Two units at most, and none that is zero."""
    assert WORDS["en"].duration(seconds) == english
    assert WORDS["ko"].duration(seconds) == korean


def test_numbers_sizes_and_money():
    """As people write them."""
    words = WORDS["en"]
    assert (words.number(1234567), words.seconds(5), words.seconds(2.5)) == ("1,234,567", "5 s", "2.5 s")
    assert [words.size(n) for n in (10, 85_400, 3_240_000, 99_960_000, 2_500_000_000)] == [
        "1 KB",
        "85 KB",
        "3.2 MB",
        "100 MB",
        "2.5 GB",
    ]
    assert [words.money(usd) for usd in (0, 0.0042, 0.25, 1234.5)] == ["$0.00", "$0.0042", "$0.25", "$1,234.50"]
    assert [words.limit(n) for n in (50_000_000, 52_428_800, 800)] == ["50 MB", "52 MB", "0 KB"]
    assert [words.count("group.clips", n) for n in (1, 2)] == ["1 clip", "2 clips"]
    assert [WORDS["ko"].count("group.clips", n) for n in (1, 2)] == ["영상 1개", "영상 2개"]


def test_time_left():
    """Unknown rather than wrong, and no zero."""
    english, korean = WORDS["en"], WORDS["ko"]
    assert [english.left(s) for s in (None, 0.2, 90)] == ["—", "any moment", "1 min 30 s left"]
    assert [korean.left(s) for s in (None, 0.2, 90)] == ["—", "곧 끝남", "1분 30초 남음"]


def test_stages():
    """Known ones have a name in each language, others are shown as the worker calls them."""
    assert (WORDS["ko"].stage("denoise"), WORDS["ko"].stage("warp"), WORDS["en"].stage(None)) == (
        "장면 그리는 중",
        "warp",
        "Starting",
    )


@pytest.mark.parametrize(
    "asked,remembered,accepted,language",
    [
        (None, None, None, "en"),
        (None, None, "ko-KR,ko;q=0.9,en-US;q=0.8", "ko"),
        (None, None, "en-GB,en;q=0.9,ko;q=0.8", "en"),
        (None, None, "fr, ko;q=0.5, en;q=0.4", "ko"),
        (None, None, "ko;q=0", "en"),
        (None, None, "ko;q=much, kok, *;q=1", "en"),
        (None, "ko", "en", "ko"),
        (None, "xx", "ko", "ko"),
        ("en", "ko", "ko", "en"),
        ("xx", "ko", "en", "ko"),
    ],
)
def test_the_language(asked, remembered, accepted, language):
    """The address decides, then what was chosen before, then the browser."""
    assert language_of(asked=asked, remembered=remembered, accepted=accepted) == language
    assert language in LANGUAGES
