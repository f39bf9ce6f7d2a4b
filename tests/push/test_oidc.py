"""Tokens of Google's service accounts: the real google-auth, keys of the test, certificates on loopback."""

import threading
import time
from collections.abc import Iterator

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpx
import pytest

from inference.errors import SettingsError
from inference.push import oidc
from inference.push.oidc import CERTIFICATES_URL, Certificates, GoogleTokens
from tests.support.google import ACCOUNT, AUDIENCE, Issuer

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    """Keys take a moment to make."""
    return Issuer()


@pytest.fixture
def google(issuer) -> Iterator[tuple[Issuer, GoogleTokens]]:
    """An issuer whose certificates are served, and a verifier that asks there."""
    issuer.asked, issuer.away, issuer.max_age_s = 0, False, 3600
    with issuer.serving() as url, httpx.Client(timeout=5) as client:
        yield (
            issuer,
            GoogleTokens(AUDIENCE, [ACCOUNT.upper()], certificates=Certificates(client), certificates_url=url),
        )


async def status(tokens, token):
    """What a token is worth: 200 where it is admitted."""
    verdict = await tokens.verdict(token)
    return verdict.status if verdict else 200


async def test_a_listed_account_is_admitted(google):
    """And its certificates are fetched once, however many tokens come."""
    issuer, tokens = google
    assert [await status(tokens, issuer.token()) for _ in range(5)] == [200] * 5
    assert issuer.asked == 1


async def test_what_is_not_admitted(google):
    """Wrong audience, a prefix of it, no audience, wrong issuer, too old, from the future: 401. Others' accounts and
    addresses that are not verified: 403.
    """
    issuer, tokens = google
    now = int(time.time())
    for claims in (
        {"aud": "https://other.example.com/jobs/run"},
        {"aud": AUDIENCE + "/"},
        {"aud": None},
        {"aud": ""},
        {"iss": "https://evil.example.com"},
        {"iss": None},
        {"iat": now - 7200, "exp": now - 3600},
        {"iat": now + 600, "exp": now + 3600},
        {"exp": None},
    ):
        assert await status(tokens, issuer.token(**claims)) == 401, claims
    for claims in (
        {"email": "somebody@gmail.com"},
        {"email": None},
        {"email": ["tasks@project.iam.gserviceaccount.com"]},
        {"email_verified": False},
        {"email_verified": None},
        {"email_verified": "true"},
    ):
        assert await status(tokens, issuer.token(**claims)) == 403, claims


async def test_clocks_may_differ_a_little(google):
    """By half a minute, as Google's own examples allow."""
    issuer, tokens = google
    now = int(time.time())
    assert await status(tokens, issuer.token(iat=now + 20, exp=now + 3600)) == 200
    assert await status(tokens, issuer.token(iat=now - 3600, exp=now - 20)) == 200


async def test_forgeries(google):
    """Signed by somebody else under a known key's name, tampered with, without a signature, no token at all."""
    issuer, tokens = google
    other = Issuer()
    header, claims, signature = issuer.token().split(".")
    for token in (
        other.token(),
        f"{header}.{issuer.token(email='x@y.z').split('.')[1]}.{signature}",
        f"{header}.{claims}.",
        "eyJhbGciOiJub25lIn0." + claims + ".",
        "a.b.c",
        "..",
        "é.é.é",
    ):
        assert await status(tokens, token) == 401, token


async def test_certificates_that_are_away(google, monkeypatch):
    """503, whether nobody listens or nonsense is answered; and what was kept is enough meanwhile."""
    issuer, tokens = google
    issuer.away = True
    assert [await status(tokens, issuer.token()) for _ in range(3)] == [503] * 3
    assert issuer.asked == 1
    issuer.away = False
    assert await status(tokens, issuer.token()) == 503  # for a moment nobody is asked
    monkeypatch.setattr(oidc, "AWAY_S", 0.0)
    tokens._certificates._away.clear()
    assert await status(tokens, issuer.token()) == 200
    issuer.away = True
    assert await status(tokens, issuer.token()) == 200
    with httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, text="<html>log in</html>"))) as it:
        portal = GoogleTokens(AUDIENCE, [ACCOUNT], certificates=Certificates(it), certificates_url=CERTIFICATES_URL)
        assert await status(portal, issuer.token()) == 503
    nobody = GoogleTokens(AUDIENCE, [ACCOUNT], certificates_url="http://127.0.0.1:9/certs")
    assert await status(nobody, issuer.token()) == 503


async def test_strangers_take_no_thread_from_jobs():
    """However many send something to check while Google swallows what it is asked; and they wait for one fetch."""
    asked, go_on = [], threading.Event()

    def swallow(request):
        asked.append(request)
        go_on.wait(30)
        raise httpx.ReadTimeout("timed out")

    statuses = []
    with httpx.Client(transport=httpx.MockTransport(swallow)) as client:
        tokens = GoogleTokens(AUDIENCE, [ACCOUNT], certificates=Certificates(client))

        async def check():
            statuses.append(await status(tokens, "a.b.c"))

        async with anyio.create_task_group() as strangers:
            for _ in range(50):
                strangers.start_soon(check)
            with anyio.fail_after(20):
                while not asked:
                    await anyio.lowlevel.checkpoint()
                await anyio.to_thread.run_sync(go_on.set)
    assert (statuses, len(asked)) == ([503] * 50, 1)


async def test_keys_are_rotated(google, monkeypatch):
    """A key that is not known yet is fetched, but not more often than once a minute: forgeries cost no fetches."""
    issuer, tokens = google
    assert await status(tokens, issuer.token()) == 200
    issuer.rotate("key-2", keep=True)
    assert await status(tokens, issuer.token()) == 401
    assert issuer.asked == 1
    monkeypatch.setattr(oidc, "MIN_AGE_S", 0.0)
    assert await status(tokens, issuer.token()) == 200
    assert issuer.asked == 2


async def test_a_forgery_takes_no_certificates_away(google, monkeypatch):
    """It makes us look for new ones; where Google does not answer then, the old ones are good for everybody else."""
    issuer, tokens = google
    assert await status(tokens, issuer.token()) == 200
    issuer.away = True
    monkeypatch.setattr(oidc, "MIN_AGE_S", 0.0)
    assert await status(tokens, Issuer().token()) == 503
    assert await status(tokens, issuer.token()) == 200


def test_an_audience_alone_lets_nobody_in():
    """Anybody can have a token for any audience, so callers have to be listed; and an audience is never left out."""
    with pytest.raises(SettingsError, match="I2V_PUSH_CALLERS"):
        GoogleTokens(AUDIENCE, [])
    with pytest.raises(SettingsError, match="I2V_PUSH_AUDIENCE"):
        GoogleTokens("", [ACCOUNT])
