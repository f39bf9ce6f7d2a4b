"""Sessions of the page: the key was typed in once, and a cookie stands for it from then on."""

import time
from collections.abc import Callable

from starlette.requests import HTTPConnection

from inference.progress.web.seals import Seals

COOKIE = "i2v_session"

LIFETIME_S = 30 * 24 * 3600


class Sessions:
    """Makes and checks the values of the cookie. Nothing is kept of a session: its value is signed.

    So signing out is the browser's forgetting it, and what ends every session at once is another key.
    """

    def __init__(self, signing_secret: str, api_key: str, clock: Callable[[], float] = time.time) -> None:
        self._seals = Seals(signing_secret, "session", api_key, clock)

    def open(self) -> str:
        """The value of the cookie for somebody who has just shown the key."""
        return self._seals.make("", LIFETIME_S)

    def holds(self, value: str) -> bool:
        """Whether the value was made here, with the key of today, and has not expired."""
        return self._seals.is_valid(value, "")


def is_https(connection: HTTPConnection) -> bool:
    """Whether the browser came over https, so that its cookie may be kept to https.

    A proxy in front says so in X-Forwarded-Proto. Anybody may send that header, but all that follows from it is how the
    sender's own cookie is set, so it is believed here and nowhere else.
    """
    forwarded = connection.headers.get("x-forwarded-proto", "").split(",")[0].strip().lower()
    return "https" in (connection.scope["scheme"], forwarded)
