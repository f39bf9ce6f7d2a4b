"""The address of the worker API, from settings."""

import httpx

from inference.errors import SettingsError
from inference.transfer.network import safe_for_a_key


def worker_api_url(api_url: str) -> str:
    """`https://host/api/worker/` of `https://host`, with or without a trailing slash or `/api`.

    Raises SettingsError: the key must not travel in the clear, save to this machine.
    """
    try:
        url = safe_for_a_key(api_url)
    except SettingsError as error:
        raise SettingsError(f"VERCEL_API_URL: {error}") from None
    path = url.path.rstrip("/").removesuffix("/api")
    return str(url.copy_with(path=f"{path}/api/worker/"))


def may_be_proxied(url: str) -> bool:
    """Whether a client of this worker API goes through the environment's proxy.

    Plain http leads to this machine only: a proxy would look for it on its own, and read the key.
    """
    return httpx.URL(url).scheme == "https"
