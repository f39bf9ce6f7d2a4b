"""What the clients of JSON APIs share, on real connections. The rest is with each client's own tests."""

from contextlib import asynccontextmanager, suppress

import anyio
import anyio.lowlevel
import httpx
import pytest

from inference.transfer.json_api import ApiAnswer, JsonApi, Unanswered

KEY = "sk_secret"
YES = b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"why":"yes"}'

pytestmark = pytest.mark.anyio


class Why(ApiAnswer):
    """An API that says why."""

    @staticmethod
    def told(payload):
        """See ApiAnswer."""
        return str(payload.get("why") or "")


@asynccontextmanager
async def listening(*parts, pause_s=0.0):
    """A server on loopback that sends `parts` to everyone and hangs up: its origin, and the requests' first lines."""
    seen = []

    async def serve(stream):
        async with stream:
            seen.append((await stream.receive()).partition(b"\r\n")[0].decode(errors="replace"))  # TLS is no text
            with suppress(anyio.BrokenResourceError):
                for part in parts:
                    await stream.send(part)
                    await anyio.sleep(pause_s)

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        yield f"http://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}", seen
        tasks.cancel_scope.cancel()


def api_at(url, *, key=KEY, limit_s=20.0, **options):
    """A client of it."""
    return JsonApi(Why, url, key, limit_s=limit_s, **options)


async def unanswered(url, *, ask_s=None, **options):
    """How a question that gets no answer ends."""
    async with api_at(url, **options) as api:
        with pytest.raises(Unanswered) as caught:
            await api.ask("POST", "x", {}, limit_s=ask_s)
    return caught.value


async def test_whether_a_question_was_sent_is_known(monkeypatch):
    """Not while a connection is made: to the port, through TLS, through a proxy. Afterwards, who knows."""
    async with listening() as (hangs_up, seen):
        assert (await unanswered(hangs_up)).sent
        assert not (await unanswered(hangs_up.replace("http:", "https:"))).sent
    assert seen[0] == "POST /x HTTP/1.1"
    error = await unanswered(hangs_up)
    assert (error.sent, str(error)) == (False, "127.0.0.1: All connection attempts failed")
    async with listening(b"HTTP/1.1 407 Not you\r\n\r\n") as (proxy, asked):
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        assert not (await unanswered("https://api.example")).sent
        async with listening(YES) as (origin, _), api_at(origin) as api:  # this machine is not looked for behind it
            assert await api.ask("GET", "x") == Why(200, {"why": "yes"}, "yes")
    assert asked == ["CONNECT api.example:443 HTTP/1.1"]


async def test_every_question_has_a_connection_of_its_own():
    """One that is kept could be closed at the moment it is written to, and then nobody knows what was sent."""
    async with listening(YES, pause_s=5) as (origin, seen), api_at(origin) as api:
        for _ in range(3):
            assert (await api.ask("GET", "x")).status == 200
    assert len(seen) == 3


async def test_silence_and_trickles_come_to_an_end():
    """Of the whole question, its own limit before that of all; of a silence, where the client has one for that."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"
    async with listening(head, *[b" "] * 90, pause_s=0.05) as (trickles, _), listening(head, pause_s=5) as (stalls, _):
        for error in (
            await unanswered(trickles, idle_s=2.0, limit_s=0.3),
            await unanswered(trickles, ask_s=0.3),
            await unanswered(stalls, limit_s=0.3),
            await unanswered(stalls, limit_s=0.1, ask_s=0.3),
        ):
            assert (error.sent, str(error)) == (True, "127.0.0.1: TimeoutError")
        error = await unanswered(stalls, idle_s=0.1)
        assert (error.sent, str(error)) == (True, "127.0.0.1: ReadTimeout")


@pytest.mark.parametrize(
    "text, payload, said",
    [
        ('{"why": "no\\n sk_secret\\u0007"}', {"why": "no\n sk_secret\a"}, "no …"),
        ('{"why": null}', {"why": None}, "I'm a teapot"),
        ('["why"]', ["why"], "I'm a teapot"),
        ("<html>", None, "I'm a teapot"),
        ("", None, "I'm a teapot"),
        ("[" * 100_000, None, "I'm a teapot"),
        ("\udcff", None, "I'm a teapot"),
    ],
    ids=lambda it: repr(it)[:30],
)
async def test_whatever_is_answered_is_an_answer(text, payload, said):
    """For people one line without the key; that of HTTP itself where the API says nothing."""
    content = text.encode(errors="surrogateescape")
    transport = httpx.MockTransport(lambda _: httpx.Response(418, content=content))
    async with api_at("https://api.example", transport=transport) as api:
        assert await api.ask("GET", "x") == Why(418, payload, said)


@pytest.mark.parametrize("key, said", [(KEY, "api.example: bad … there"), ("", f"api.example: bad {KEY} there")])
async def test_no_error_tells_the_key(key, said):
    """Nor is anything taken out where there is none."""

    def break_down(_):
        raise httpx.RemoteProtocolError(f"bad\n{KEY} there")

    error = await unanswered("https://api.example", key=key, transport=httpx.MockTransport(break_down))
    assert str(error) == said


async def test_it_is_closed_even_when_its_user_is_cancelled():
    """Connections that are left open would be told of as warnings, somewhere else."""
    closed = []

    class Transport(httpx.AsyncBaseTransport):
        async def aclose(self):
            await anyio.lowlevel.checkpoint()
            closed.append(True)

    with anyio.CancelScope() as scope:
        async with api_at("https://api.example", transport=Transport()):
            scope.cancel()
            await anyio.lowlevel.checkpoint()
    assert closed == [True]


async def test_a_key_that_no_header_can_carry_is_not_told():
    """Whoever refuses it shows it escaped, in which it is not found and taken out."""
    async with listening() as (url, _):
        error = await unanswered(url, key="sek\nret")
    assert str(error) == "127.0.0.1: LocalProtocolError"
