"""The network for presigned URLs: connects to public addresses only, and does not lose early answers.

Both are done below httpx, where connections are made, so that no redirect, odd spelling of a host or second DNS look-up
can bypass them.
"""

import ipaddress
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel
import httpcore
import httpx

from inference.errors import AddressRefused, SettingsError
from inference.transfer.tls import tls_context

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

EARLY_ANSWER_S = 0.05
"""How long to read from a connection that became readable before the request was sent. Long enough for bytes
that are here already; TLS session tickets also make it readable, once, and carry nothing to read."""

MAX_PORT = 65_535

MAX_EARLY_BYTES = 64 * 1024
"""How much of an answer is kept while its request is still being sent: as much as is ever read of a refusal. The rest
is not read from the connection, so an answer without end cannot fill memory during a long upload."""

NOT_FOR_US = (
    ipaddress.IPv4Network("192.0.0.0/24"),  # IETF assignments; Oracle Cloud metadata at .192; Python calls it global
    # Azure's platform, credentials included, behind an address that counts as public
    # (https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16)
    ipaddress.IPv4Network("168.63.129.16/32"),
)
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # all addresses that IANA allocates for the internet
TUNNELS = (ipaddress.IPv6Network("2001::/32"), ipaddress.IPv6Network("2002::/16"))  # Teredo, 6to4: contain an IPv4
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052; how an IPv6-only network reaches IPv4


def is_public(address: str) -> bool:
    """Whether an address is on the public internet: not loopback, private, link-local, metadata or multicast."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip in NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)))
        return ip in GLOBAL_UNICAST and ip.is_global and not any(ip in tunnel for tunnel in TUNNELS)
    special = ip.is_multicast or ip.is_reserved or any(ip in network for network in NOT_FOR_US)
    return ip.is_global and not special


def is_this_machine(host: str) -> bool:
    """Whether the host of a URL is this machine, so that nothing is sent over a network."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_of_a_private_network(host: str) -> bool:
    """Whether the host of a URL is this machine, or evidently another one of the same private network.

    That is a private address, a name without a domain as in `docker compose`, or one under a domain for such networks
    (RFC 6762, RFC 8375; `.internal` is reserved by ICANN).
    """
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".local", ".lan", ".home.arpa", ".internal"))


def flaw_in(url: httpx.URL) -> str | None:
    """Why no client can connect to a URL; None where one might."""
    if url.scheme not in ("http", "https") or not url.host:
        return "neither http nor https"
    if url.port is not None and not 0 < url.port <= MAX_PORT:
        return f"there is no port {url.port}"
    return None


def _one_name(host: str) -> str:
    return "localhost" if is_this_machine(host) else host


def safe_for_a_key(url: str, may_be_plain: Callable[[str], bool] = is_this_machine) -> httpx.URL:
    """The URL of a service that a key is sent to.

    `may_be_plain`: hosts for which plain http will do. Raises SettingsError: elsewhere the key must not travel in the
    clear.
    """
    try:
        parsed = httpx.URL(url.strip())
    except (httpx.InvalidURL, UnicodeError):
        parsed = httpx.URL()
    if not parsed.host or parsed.scheme not in ("http", "https") or parsed.query or parsed.fragment or parsed.userinfo:
        raise SettingsError("must look like https://host, without query, fragment or user")
    if flaw := flaw_in(parsed):
        raise SettingsError(flaw)
    if parsed.scheme == "http" and not may_be_plain(parsed.host):
        raise SettingsError(f"must be https, since {parsed.host} is not this machine")
    return parsed


async def resolve(host: str, port: int) -> Sequence[str]:
    """Every address of a host, in the order to try them. Reads `127.1`, `0x7f000001` and the like as connect does."""
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


class GuardedNetwork(httpcore.AsyncNetworkBackend):
    """Connects only to public addresses, or to a (host, port) that the operator named; None stands for every port.

    All names of this machine count as one host: an app at `localhost` has its storage at `127.0.0.1`.

    A name is resolved once, every address of it is checked, and the connection goes to an address that was
    checked: a name server that answers differently the next time (DNS rebinding) gains nothing.
    """

    def __init__(
        self,
        *,
        trusted: Collection[tuple[str, int | None]] = (),
        allow_private: bool = False,
        resolve: Resolve = resolve,
        inner: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        self._trusted = frozenset((_one_name(host), port) for host, port in trusted)
        self._allow_private = allow_private
        self._resolve = resolve
        self._inner = inner or httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises AddressRefused where any address of the host is not public."""
        failure: httpcore.ConnectError | httpcore.ConnectTimeout | None = None
        for address in await self.addresses(host, port):
            try:
                stream = await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                return DuplexStream(stream)
        raise failure or httpcore.ConnectError("the host has no address")

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """The addresses of a host. Raises AddressRefused, httpcore.ConnectError where it has none."""
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"cannot resolve the host: {error}") from None
        name = _one_name(host)
        if not self._allow_private and self._trusted.isdisjoint({(name, port), (name, None)}):
            for address in addresses:
                if not is_public(address):
                    raise AddressRefused(
                        f"{host} is at {address}: not a public address, and not a trusted origin; "
                        "if this storage is meant to be private, set I2V_ALLOW_PRIVATE_ADDRESSES=true"
                    )
        return addresses


class DuplexStream(httpcore.AsyncNetworkStream):
    """Reads while it writes, so that a refusal sent before the body was read is not lost.

    A server that refuses a large upload early and closes makes our next write fail. httpcore then reads the
    answer, but on asyncio it is gone: a failed write drops a connection together with what was not read from it.
    (Measured: node and plain sockets, 20 of 20 answers lost with `Connection: close`, none on trio.)
    """

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._early: deque[bytes] = deque()
        self._heard = anyio.Event()

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        """Returns what arrived during a write first, then reads on."""
        if self._early:
            return self._early.popleft()
        return await self._stream.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Writes all of `buffer`. Raises WriteTimeout, or WriteError, after which httpcore goes on to read the answer.

        Reading and writing share one TLS connection, where either may get an error that httpcore does not map:
        anyio.BusyResourceError when both answer a key update at once, EndOfStream, ssl.SSLError.
        """
        failure: httpcore.WriteError | httpcore.WriteTimeout | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._listen)
            await anyio.lowlevel.checkpoint()  # the listener is reading from here on
            if self._stream.get_extra_info("is_readable"):
                with anyio.move_on_after(EARLY_ANSWER_S):
                    await self._heard.wait()
            try:
                await self._stream.write(buffer, timeout)
            except (httpcore.WriteError, httpcore.WriteTimeout) as error:
                failure = error
            except Exception as error:  # noqa: BLE001  out of the group, and as what httpcore knows
                failure = httpcore.WriteError(f"{type(error).__name__} {error}")
            tasks.cancel_scope.cancel()
        if failure is not None and self._early:
            raise httpcore.WriteError("answered before the request was whole")
        if failure is not None:
            raise failure

    async def _listen(self) -> None:
        with suppress(Exception):  # the next read or write meets the same error
            while room := MAX_EARLY_BYTES - sum(map(len, self._early)):
                if not (data := await self._stream.read(room)):
                    break
                self._early.append(data)
                self._heard.set()
        self._heard.set()  # not when cancelled: then there may be more to hear during the next write

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        return DuplexStream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class GuardedTransport(httpx.AsyncHTTPTransport):
    """httpx's own transport over a GuardedNetwork. Proxies of the environment are not used.

    One connection per request and as many as there are requests: a transfer that waits for another would time out.
    """

    def __init__(self, network: GuardedNetwork) -> None:
        super().__init__(verify=tls_context())
        # httpx has no argument for httpcore's network backend.
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls_context(), max_connections=None, max_keepalive_connections=0, network_backend=network
        )
