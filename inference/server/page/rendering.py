"""Templates become answers, with the headers that keep a page of ours to itself."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import HTMLResponse, Response

from inference.server.page.filter import STATUSES
from inference.server.page.views import STALE_S
from inference.server.page.words import LANGUAGES, NAMES, Words
from inference.server.wire import iso
from inference.task import MAX_DURATION_S, MAX_PROMPT_CHARS, MIN_DURATION_S

HEADERS: Mapping[str, str] = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "media-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    # With no-referrer browsers send `Origin: null` along with a form, as if another site had sent it.
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
    "vary": "cookie, accept-language",
}

MEDIA_TYPES: Mapping[str, str] = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file that the page loads."""

    content: bytes
    media_type: str
    digest: str  # part of its address, so that browsers may keep it


def _static_files() -> dict[str, StaticFile]:
    folder = resources.files("inference.server.page") / "static"
    return {
        file.name: StaticFile(
            content := file.read_bytes(),
            MEDIA_TYPES["." + file.name.rpartition(".")[2]],
            hashlib.sha256(content).hexdigest()[:12],
        )
        for file in folder.iterdir()
    }


class Renderer:
    """The templates, loaded once."""

    def __init__(self) -> None:
        self._static = _static_files()
        self._templates = Environment(
            loader=PackageLoader("inference.server.page"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals.update(
            static=self._address,
            iso=iso,
            compact=_compact,
            languages=LANGUAGES,
            language_names=NAMES,
            statuses=STATUSES,
            stale_s=STALE_S,
            min_seconds=f"{MIN_DURATION_S:g}",
            max_seconds=f"{MAX_DURATION_S:g}",
            max_prompt_chars=MAX_PROMPT_CHARS,
        )

    def html(self, template: str, words: Words, status: int = 200, **values: Any) -> HTMLResponse:
        """A template as an answer; `t` in it is the words."""
        text = self._templates.get_template(template).render(t=words, **values)
        return HTMLResponse(text, status, dict(HEADERS))

    def static(self, name: str, digest: str | None) -> Response | None:
        """A file that the page loads; None where there is none of that name."""
        file = self._static.get(name)
        if file is None:
            return None
        kept = "public, max-age=31536000, immutable" if digest == file.digest else "no-cache"
        return Response(file.content, media_type=file.media_type, headers={"cache-control": kept})

    def _address(self, name: str) -> str:
        return f"page/static/{name}?v={self._static[name].digest}"


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
