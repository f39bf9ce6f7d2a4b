"""OIDC tokens of Google's service accounts, as Cloud Tasks and Cloud Scheduler send them."""

import json
import math
import re
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import anyio
import anyio.to_thread
import httpx
import structlog
from google.auth import exceptions
from google.oauth2 import id_token

from inference.errors import SettingsError, one_line
from inference.push.auth import Verdict
from inference.transfer.tls import tls_context

log = structlog.get_logger(__name__)

CERTIFICATES_URL = "https://www.googleapis.com/oauth2/v1/certs"
"""Where Google publishes what its ID tokens are signed with (google.oauth2.id_token._GOOGLE_OAUTH2_CERTS_URL)."""

ISSUERS = {"accounts.google.com", "https://accounts.google.com"}
"""As google.oauth2.id_token.verify_oauth2_token has them."""

CLOCK_SKEW_S = 30
"""How far the clocks of Google and of this machine may be apart."""

FETCH_LIMIT_S = 10.0

DEFAULT_AGE_S = 3600.0
"""How long certificates are kept where their answer does not say."""

MIN_AGE_S = 60.0
"""A token that no kept certificate fits makes us fetch them again, for they may have been changed; but not more often
than this, whatever strangers send."""

AWAY_S = 5.0
"""Certificates that could not be fetched are not asked for again so soon: calls that come together get one answer."""

THREADS = 4
"""That check tokens. While Google does not answer they wait, and anybody can send something to check: the threads that
jobs need are others."""

MAX_REASON_CHARS = 200


@dataclass(frozen=True, slots=True)
class _Kept:
    """An answer that was kept, as google.auth.transport.Response describes one."""

    status: int
    headers: httpx.Headers
    data: bytes


class Certificates:
    """Fetches like google-auth's own transport, but asks for the same URL again only when its answer is too old.

    Called from threads.
    """

    def __init__(self, client: httpx.Client | None = None) -> None:
        self._client = client or httpx.Client(timeout=FETCH_LIMIT_S, verify=tls_context())
        self._kept: dict[str, tuple[_Kept, float, float]] = {}  # by URL: asked for at, fresh until; monotonic seconds
        self._away: dict[str, tuple[str, float]] = {}  # by URL: why it could not be fetched, asked again from
        self._doubted: set[str] = set()  # URLs that are fetched next time, whatever is kept
        self._lock = threading.Lock()

    def __call__(self, url: str, method: str = "GET", **_: Any) -> _Kept:
        """See google.auth.transport.Request. Raises TransportError."""
        with self._lock:
            is_doubted = url in self._doubted
            self._doubted.discard(url)
            if url in self._kept and time.monotonic() < self._kept[url][2] and not is_doubted:
                return self._kept[url][0]
            why, until = self._away.get(url, ("", -math.inf))
            if time.monotonic() < until:
                raise _away(why)
            try:
                kept = self._fetched(url, method)
            except exceptions.TransportError as away:
                self._away[url] = (str(away), time.monotonic() + AWAY_S)
                raise
            now = time.monotonic()
            self._kept[url] = (kept, now, now + _age_s(kept.headers))
            return kept

    def _fetched(self, url: str, method: str) -> _Kept:
        """Raises TransportError."""
        try:
            answer = self._client.request(method, url)
        except httpx.HTTPError as error:
            raise _away(f"{type(error).__name__}: {error}") from None
        if answer.status_code != 200:
            raise _away(f"HTTP {answer.status_code}")
        if not _is_object(answer.content):  # a portal's page, for one; the library would blame the token
            raise _away("the answer holds no certificates")
        return _Kept(answer.status_code, answer.headers, answer.content)

    def doubt(self, url: str) -> bool:
        """Fetches it again next time; False where it is too fresh for that. Where that fails, the old one stays."""
        with self._lock:
            known = self._kept.get(url)
            now = time.monotonic()
            if known is None or now < known[1] + MIN_AGE_S:
                return False
            self._kept[url] = (known[0], now, known[2])
            self._doubted.add(url)
            return True


class GoogleTokens:
    """Verifies tokens: made by Google, for exactly our audience, and of a listed account whose address is verified."""

    def __init__(
        self,
        audience: str,
        callers: Collection[str],
        *,
        certificates: Certificates | None = None,
        certificates_url: str = CERTIFICATES_URL,
    ) -> None:
        """Raises SettingsError without audience or callers: anybody with a Google account can have some token."""
        if not audience:
            raise SettingsError("I2V_PUSH_AUDIENCE is not set: set it to the URL that tokens are made for")
        if not callers:
            raise SettingsError(
                "I2V_PUSH_CALLERS is not set: list the service accounts that may call, such as "
                "tasks@project.iam.gserviceaccount.com"
            )
        self._audience, self._callers = audience, frozenset(each.lower() for each in callers)
        self._certificates = certificates or Certificates()
        self._url = certificates_url
        self._threads = anyio.CapacityLimiter(THREADS)

    async def verdict(self, token: str) -> Verdict | None:
        """See Tokens."""
        try:
            claims = await anyio.to_thread.run_sync(self._claims, token, limiter=self._threads)
        except exceptions.TransportError as error:  # a GoogleAuthError, too: it has to come first
            log.warning("certificates_away", error=one_line(str(error), MAX_REASON_CHARS))
            return Verdict(503, "Google's certificates cannot be fetched")
        except (ValueError, exceptions.GoogleAuthError) as error:
            return Verdict(401, f"not a token for this address: {one_line(str(error), MAX_REASON_CHARS)}")
        email = claims.get("email")
        if claims.get("email_verified") is not True:  # the library does not look at it
            return Verdict(403, "the address of the token's account is not verified")
        if not isinstance(email, str) or email.lower() not in self._callers:
            return Verdict(403, "the token's account is not in I2V_PUSH_CALLERS")
        return None

    def _claims(self, token: str) -> Mapping[str, Any]:
        try:
            return self._verified(token)
        except exceptions.TransportError:
            raise
        except ValueError:  # certificates change; with new ones the same token may be good
            if not self._certificates.doubt(self._url):
                raise
        return self._verified(token)

    def _verified(self, token: str) -> Mapping[str, Any]:
        claims: Mapping[str, Any] = id_token.verify_token(
            token,
            cast("Any", self._certificates),
            audience=self._audience,
            certs_url=self._url,
            clock_skew_in_seconds=CLOCK_SKEW_S,
        )
        if claims.get("iss") not in ISSUERS:
            raise ValueError("Google did not issue it")
        return claims


def _away(why: str) -> exceptions.TransportError:
    return exceptions.TransportError(why)  # type: ignore[no-untyped-call]


def _is_object(body: bytes) -> bool:
    try:
        return isinstance(json.loads(body), dict)
    except ValueError:
        return False


def _age_s(headers: httpx.Headers) -> float:
    found = re.search(r"max-age=(\d{1,8})\b", headers.get("cache-control", ""))
    return max(MIN_AGE_S, min(float(found[1]), 86_400.0)) if found else DEFAULT_AGE_S
