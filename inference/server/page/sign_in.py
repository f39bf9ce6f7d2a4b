"""Signing in with the key, once for each browser, and signing out."""

import hmac

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from inference.server.config import ServerConfig
from inference.server.page.asking import words_for
from inference.server.page.attempts import Attempts
from inference.server.page.rendering import Renderer
from inference.server.sessions import COOKIE, LIFETIME_S, Sessions

MAX_KEY_CHARS = 10_000


def sign_in_routes(config: ServerConfig, renderer: Renderer) -> APIRouter:
    """`/sign-in` and `/sign-out`. Without a key there is nobody to keep out, and both lead to the page."""
    routes = APIRouter(include_in_schema=False)
    key = config.api_key
    if key is None:

        @routes.post("/sign-out")
        @routes.get("/sign-in")
        def no_need() -> Response:
            return RedirectResponse("./", 303)

        return routes

    sessions = Sessions(config.signing_secret, key)
    attempts = Attempts()

    @routes.get("/sign-in")
    def form(request: Request) -> Response:
        if sessions.holds(request.cookies.get(COOKIE, "")):
            return RedirectResponse("./", 303)
        return renderer.html("sign_in.html", words_for(request), error=None)

    @routes.post("/sign-in")
    async def sign_in(request: Request) -> Response:
        words = words_for(request)
        given = (await request.form(max_files=0, max_fields=10)).get("key")
        # Nothing is waited for from here on: else all of many tries at once would be looked at before one is counted.
        address = request.client.host if request.client else ""
        if pause_s := attempts.pause_s(address):
            wait = words("sign_in.pause", time=words.duration(pause_s + 1))
            answer: Response = renderer.html("sign_in.html", words, 429, error=wait)
            answer.headers["retry-after"] = str(int(pause_s) + 1)
            return answer
        typed = given.strip() if isinstance(given, str) and len(given) <= MAX_KEY_CHARS else ""
        if not hmac.compare_digest(typed.encode("utf-8", "replace"), key.encode()):
            attempts.wrong(address)
            return renderer.html("sign_in.html", words, 403, error=words("sign_in.wrong"))
        attempts.right(address)
        answer = RedirectResponse("./", 303)
        answer.set_cookie(
            COOKIE,
            sessions.open(),
            max_age=LIFETIME_S,
            path="/",
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
        )
        return answer

    @routes.post("/sign-out")
    def sign_out(request: Request) -> Response:
        answer = RedirectResponse("sign-in", 303)
        answer.delete_cookie(COOKIE, path="/", secure=request.url.scheme == "https", httponly=True, samesite="strict")
        return answer

    return routes
