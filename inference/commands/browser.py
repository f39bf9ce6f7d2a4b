"""The browser of whoever sits at this machine."""

import threading
import webbrowser
from pathlib import Path

IN_THE_TERMINAL = {"www-browser", "links", "elinks", "lynx", "w3m", "browsh"}
"""Browsers that Python would start where there is no screen. They would take over the terminal of the command."""


def open_browser(url: str) -> None:
    """Opens a page in a browser, if this machine has one; does not wait for it."""
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return
    if Path(getattr(browser, "name", "")).name in IN_THE_TERMINAL:
        return
    # Some browsers are waited for until they are closed.
    threading.Thread(target=browser.open, args=(url,), name="browser", daemon=True).start()
