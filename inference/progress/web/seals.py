"""Short texts that only the holder of a secret can have made, and that expire."""

import base64
import hashlib
import hmac
import time
from collections.abc import Callable

MAX_LENGTH = 100
"""Characters of a seal; longer ones are not looked at."""


class Seals:
    """Makes and checks seals for one purpose. A seal names a subject and the second at which it expires.

    `EXPIRES.MAC`: seconds since the epoch, and HMAC-SHA256 over the purpose, the key's digest, the subject and EXPIRES,
    in URL-safe base64. The subject is not in it: who checks a seal knows what it has to be for.
    """

    def __init__(self, secret: str, purpose: str, key: str = "", clock: Callable[[], float] = time.time) -> None:
        """`purpose`: seals for another purpose are not valid here. `key`: once it changes, no earlier seal is valid.

        Raises ValueError for an empty secret, since anybody could make such seals.
        """
        if not secret:
            raise ValueError("the secret is empty")
        self._secret = secret.encode()
        self._prefix = f"{purpose}\0{hashlib.sha256(key.encode()).hexdigest()}"
        self._clock = clock

    def make(self, subject: str, lifetime_s: float) -> str:
        """A seal that is valid for `lifetime_s` from now."""
        expires = str(int(self._clock() + lifetime_s))
        return f"{expires}.{self._mac(subject, expires)}"

    def is_valid(self, seal: str, subject: str) -> bool:
        """Whether the seal was made here, for this subject, and has not expired."""
        if len(seal) > MAX_LENGTH or not seal.isascii():
            return False
        expires, _, mac = seal.partition(".")
        return (
            expires.isdigit() and hmac.compare_digest(mac, self._mac(subject, expires)) and int(expires) > self._clock()
        )

    def _mac(self, subject: str, expires: str) -> str:
        message = f"{self._prefix}\0{expires}\0{subject}"  # only the subject may hold any character, so it is the last
        # A text of a URL or a form may hold what UTF-8 cannot encode.
        digest = hmac.digest(self._secret, message.encode("utf-8", "surrogatepass"), "sha256")
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")
