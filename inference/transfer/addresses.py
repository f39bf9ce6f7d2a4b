"""Addresses that this machine's settings name."""

import httpx


def may_be_proxied(url: str) -> bool:
    """Whether a client of this worker API goes through the environment's proxy.

    Plain http leads to this machine only: a proxy would look for it on its own, and read the key.
    """
    return httpx.URL(url).scheme == "https"
