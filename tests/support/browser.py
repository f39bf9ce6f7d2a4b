"""A real browser for tests, and whatever went wrong in it.

Debian's `chromium-headless-shell`, driven by playwright. Playwright's own downloads are not needed.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Request, sync_playwright

PROGRAMS = ("chromium-headless-shell", "chrome-headless-shell", "headless_shell", "chromium", "google-chrome")
FOLDERS = ("/usr/bin", "/usr/lib/chromium", "/usr/local/bin")

OPTIONS = [
    # Names of other machines lead nowhere, so that a page that asks for one fails here as it would without a network.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
    "--disable-dev-shm-usage",  # containers have 64 MB of it, which a video can fill
]


def program() -> str:
    """The path of a browser. Skips where there is none; fails where CI is set."""
    path = os.pathsep.join((os.environ["PATH"], *FOLDERS))
    for name in PROGRAMS:
        if found := shutil.which(name, path=path):
            return found
    reason = "no browser to test the page with: apt-get install chromium-headless-shell"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def running_browser() -> Iterator[Browser]:
    """A browser for as long as the block.

    While the block runs, playwright's event loop counts as running in this thread: asyncio.run() would refuse, so it
    must not outlive the tests of one module.
    """
    executable = program()
    sandbox = os.geteuid() != 0  # Chromium's sandbox refuses to start as root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, chromium_sandbox=sandbox, args=OPTIONS)
        yield browser
        browser.close()


class Watch:
    """Everything that went wrong in a context, but for what the test expects.

    That is: messages of level error in the console (scripts, CSP, answers of 400 and above), exceptions that no script
    caught, requests without an answer, and requests to other hosts.
    """

    def __init__(self, context: BrowserContext, *hosts: str) -> None:
        """`hosts`: name:port of each server that may be asked."""
        self._hosts = set(hosts)
        self._expected: list[re.Pattern[str]] = []
        self.found: list[str] = []
        context.on("console", self._console)
        context.on("weberror", lambda error: self.found.append(f"exception: {error.error}"))
        context.on("request", self._request)
        context.on("requestfailed", self._failed)

    def expect(self, pattern: str) -> Self:
        """Problems that match are as they should be."""
        self._expected.append(re.compile(pattern))
        return self

    def problems(self) -> list[str]:
        """What was not expected."""
        return [it for it in self.found if not any(pattern.search(it) for pattern in self._expected)]

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "assert"):
            self.found.append(f"console: {message.text} ({message.location['url']})")

    def _request(self, request: Request) -> None:
        url = urlsplit(request.url)
        if url.scheme not in ("data", "blob", "about") and url.netloc not in self._hosts:
            self.found.append(f"request to another host: {request.url}")

    def _failed(self, request: Request) -> None:
        # A page that is left, and a video that was heard enough of, end their own requests.
        if request.failure != "net::ERR_ABORTED":
            self.found.append(f"request failed: {request.method} {request.url}: {request.failure}")
