"""Sessions of the page: the key was typed in once, and a cookie stands for it from then on."""

import time
from collections.abc import Callable

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
