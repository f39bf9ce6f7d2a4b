"""Who may call: the holder of a secret, or a listed service account of Google with an OIDC token for this very URL."""

import hmac
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import structlog

from inference.errors import SettingsError
from inference.push.answers import RETRY_AFTER_S, Answer

log = structlog.get_logger(__name__)

JWT_DOTS = 2
"""In a JSON web token in its compact form: header, claims, signature (RFC 7515, 3.1)."""


class Verdict(NamedTuple):
    """What a token proves: nothing (401), an account that is not listed (403), or that nothing can be checked (503)."""

    status: int
    why: str


class Tokens(Protocol):
    """Verifies OIDC tokens."""

    async def verdict(self, token: str) -> Verdict | None:
        """None where the token is that of a listed account, made for us."""
        ...


class Auth:
    """Admits calls. It cannot be made without at least one way to get in that is not open to all."""

    def __init__(self, secret: str | None, header: str, tokens: Tokens | None) -> None:
        """`header`: which may carry the secret instead of `Authorization: Bearer`.

        Raises SettingsError where there is neither a secret nor a verifier of tokens.
        """
        if not secret and tokens is None:
            raise SettingsError(
                "neither I2V_PUSH_TOKEN nor I2V_PUSH_AUDIENCE with I2V_PUSH_CALLERS is set: set one of them, since "
                "anybody who finds the address could start paid work otherwise"
            )
        self._secret, self._header, self._tokens = secret, header.lower(), tokens

    async def refusal(self, headers: Mapping[str, str]) -> Answer | None:
        """None for a call that may go on. `headers`: names in lower case."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        bearer = bearer.strip() if scheme.lower() == "bearer" else ""
        own = headers.get(self._header, "").strip()
        if self._is_secret(own) or self._is_secret(bearer):
            return None
        if not (own or bearer):
            return _refused(Verdict(401, f"a token is missing: Authorization: Bearer TOKEN, or {self._header}: TOKEN"))
        if self._tokens is None or bearer.count(".") != JWT_DOTS:
            return _refused(Verdict(401, "the token is wrong"))
        verdict = await self._tokens.verdict(bearer)
        return _refused(verdict) if verdict else None

    def _is_secret(self, given: str) -> bool:
        # As bytes, since compare_digest refuses text that is not ASCII.
        return bool(self._secret and given) and hmac.compare_digest(
            given.encode("utf-8", "surrogateescape"), (self._secret or "").encode()
        )


def _refused(verdict: Verdict) -> Answer:
    log.warning("call_refused", status=verdict.status, why=verdict.why)
    return Answer(
        http_status=verdict.status,
        outcome="unavailable" if verdict.status == 503 else "refused",
        error=verdict.why,
        retry_after_s=RETRY_AFTER_S if verdict.status == 503 else None,
    )
