"""What a request to the page asks for beside its path: the language, and whether the page's script sent it."""

from fastapi import Request

from inference.server.page.words import WORDS, Words, language_of

LANGUAGE_COOKIE = "i2v_language"

FRAGMENT = "x-fragment"
"""The header with which the page's script asks for a part of the page instead of being sent elsewhere."""


def words_for(request: Request) -> Words:
    """The words of the language to answer in."""
    language = language_of(
        asked=request.query_params.get("lang"),
        remembered=request.cookies.get(LANGUAGE_COOKIE),
        accepted=request.headers.get("accept-language"),
    )
    return WORDS[language]


def address_of(request: Request, public_url: str | None) -> str:
    """Where workers reach this server, as far as is known: behind a proxy, only where the setting says so."""
    return (public_url or str(request.base_url)).rstrip("/")


def is_fragment(request: Request) -> bool:
    """Whether the page's script asks, and not a browser that follows a link or sends a form."""
    return FRAGMENT in request.headers
