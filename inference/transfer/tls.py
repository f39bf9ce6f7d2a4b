"""Whose certificates are trusted: one answer for all clients of a process."""

import functools
import ssl

import httpx

from inference.errors import SettingsError


@functools.cache
def tls_context() -> ssl.SSLContext:
    """The authorities in the file of SSL_CERT_FILE or the folder of SSL_CERT_DIR, or else those of certifi.

    Reading the 140 or so of certifi takes longer than all else that a client does when it is made, so it is done once.
    Authorities that are put there later are trusted by the next process. Whoever gets the context leaves it as it is.
    Raises SettingsError where that file is not there, or has no certificates.
    """
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        raise SettingsError(f"SSL_CERT_FILE: no certificates can be read from it: {error.strerror or error}") from None
