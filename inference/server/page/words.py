"""What the page says, in English and Korean, and how each language writes numbers, durations, sizes and money."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from inference.server.page.english import ENGLISH
from inference.server.page.korean import KOREAN

Language = Literal["en", "ko"]

LANGUAGES: tuple[Language, ...] = get_args(Language)

NAMES: Mapping[Language, str] = {"en": "English", "ko": "한국어"}
"""Each language's name in itself."""

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400

TABLES: Mapping[Language, Mapping[str, str]] = {"en": ENGLISH, "ko": KOREAN}

FOR_SCRIPT = (
    "time.",
    "stage.",
    "upload.",
    "form.submit.",
    "said.",
    "title.",
    "clip.",
    "action.",
    "confirm.",
    "form.no",
)
"""How the keys begin that the page's script needs, too."""


class Words:
    """One language."""

    def __init__(self, language: Language) -> None:
        self.language = language
        self._table = TABLES[language]

    def __call__(self, key: str, **values: object) -> str:
        """The text of a key, its gaps filled. Raises KeyError for a key or a value that is missing."""
        return self._table[key].format(**values)

    def count(self, key: str, n: int) -> str:
        """The text for so many, such as "1 clip" and "2 clips"."""
        return self(f"{key}.{'one' if n == 1 else 'other'}", n=self.number(n))

    def number(self, n: float) -> str:
        """A whole number, its thousands apart: both languages use commas."""
        return f"{n:,.0f}"

    def stage(self, stage: str | None) -> str:
        """A stage that is known by its name here, or else as the worker calls it."""
        return self._table.get(f"stage.{stage or 'starting'}", stage or "")

    def duration(self, seconds: float) -> str:
        """As people say it, by its two largest units at most: "45 s", "3 min", "2 h 10 min"."""
        whole = max(0, round(seconds))
        if whole < MINUTE_S:
            return self("time.seconds", s=whole)
        if whole < HOUR_S:
            minutes, rest_s = divmod(whole, MINUTE_S)
            exact = minutes < 10 and rest_s  # seconds matter less the longer it takes
            return self(f"time.minutes{'_seconds' * bool(exact)}", m=minutes, s=rest_s)
        if whole < DAY_S:
            hours, minutes = divmod(whole // MINUTE_S, 60)
            return self(f"time.hours{'_minutes' * bool(minutes)}", h=hours, m=minutes)
        days, hours = divmod(whole // HOUR_S, 24)
        return self(f"time.days{'_hours' * bool(hours)}", d=self.number(days), h=hours)

    def left(self, seconds: float | None) -> str:
        """How long something still takes, as far as is known."""
        if seconds is None:
            return self("clip.unknown")
        return self("clip.left", time=self.duration(seconds)) if seconds >= 1 else self("clip.soon")

    def seconds(self, seconds: float) -> str:
        """The length of a clip: "5 s", "2.5 s"."""
        return self("time.seconds", s=f"{seconds:.1f}".removesuffix(".0"))

    def size(self, size_bytes: int) -> str:
        """In decimal units, as file managers show it: "850 KB", "3.2 MB"."""
        if size_bytes < 1_000_000:
            return f"{max(1, round(size_bytes / 1000))} KB"
        if size_bytes < 1_000_000_000:
            mb = size_bytes / 1_000_000
            return f"{mb:.0f} MB" if mb >= 99.95 else f"{mb:.1f} MB"
        return f"{size_bytes / 1_000_000_000:.1f} GB"

    def limit(self, size_bytes: int) -> str:
        """A limit, rounded down so that whatever keeps to it is accepted: "50 MB"."""
        return f"{size_bytes // 1_000_000} MB" if size_bytes >= 1_000_000 else f"{size_bytes // 1000} KB"

    def money(self, usd: float) -> str:
        """Dollars; parts of a cent only where there is nothing else."""
        return f"${usd:.4f}" if 0 < usd < 0.01 else f"${usd:,.2f}"

    def for_script(self) -> dict[str, Any]:
        """The texts that the page's script needs."""
        return {key: text for key, text in self._table.items() if key.startswith(FOR_SCRIPT)}


WORDS: Mapping[Language, Words] = {language: Words(language) for language in LANGUAGES}


def language_of(*, asked: str | None, remembered: str | None, accepted: str | None) -> Language:
    """The language to answer in: the one that the address asks for, else the cookie's, else what the browser wants.

    `accepted`: an Accept-Language header (RFC 9110, 12.5.4).
    """
    for language in LANGUAGES:
        if asked == language:
            return language
    for language in LANGUAGES:
        if remembered == language:
            return language
    best: tuple[float, Language] = (0.0, "en")
    for wanted, quality in _accepted(accepted or ""):
        for language in LANGUAGES:
            if wanted.partition("-")[0] == language and quality > best[0]:
                best = (quality, language)
    return best[1]


def _accepted(header: str) -> Iterable[tuple[str, float]]:
    for part in header.lower().split(",")[:20]:
        name, _, parameters = part.partition(";")
        quality = parameters.strip().removeprefix("q=") or "1"
        try:
            yield name.strip(), float(quality)
        except ValueError:
            continue
