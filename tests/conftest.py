"""What all tests share."""

import os
from collections.abc import Iterator

import certifi
import imageio_ffmpeg
import pytest
import structlog

from inference.settings import Settings
from tests.simulation.leases import PHOTO

# Pytest's workers are the threads. Torch, which is not imported yet, reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests compare clips bit for bit. MKL adds up in an order that depends on how a matrix is aligned in memory, unless it
# is asked for results that can be reproduced (oneMKL's developer guide, "Conditional Numerical Reproducibility").
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")


@pytest.fixture(scope="session", autouse=True)
def _few_authorities(tmp_path_factory) -> Iterator[None]:
    """One of certifi's authorities, here and in the processes of tests: every client of httpx reads the whole file.

    That takes 60 to 100 ms of a core, for clients of `http:` too, and tests make thousands; none meets an authority
    that is not its own.
    """
    first, end, _ = certifi.contents().partition("-----END CERTIFICATE-----")
    bundle = tmp_path_factory.mktemp("authorities") / "one.pem"
    bundle.write_text(f"{first}{end}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certifi, "where", lambda: str(bundle))
        patch.setenv("SSL_CERT_FILE", str(bundle))
        yield


@pytest.fixture(autouse=True)
def _a_clean_room(monkeypatch):
    """No setting of the machine reaches a test, and what a test configures does not reach the next."""
    for field in Settings.model_fields.values():
        for name in field.validation_alias.choices:
            monkeypatch.delenv(name, raising=False)
    yield
    structlog.reset_defaults()


@pytest.fixture
def anyio_backend() -> str:
    """Real sockets and threads run on asyncio, as in production; virtual time runs on trio."""
    return "asyncio"


@pytest.fixture
def photo_bytes() -> bytes:
    """The smallest photo that is one."""
    return PHOTO


@pytest.fixture
def fake_ffmpeg(tmp_path, monkeypatch):
    """Puts a shell script in the place of ffmpeg, `but_for` calls that have a word among their arguments."""

    def put(script: str, *, but_for: str | None = None) -> None:
        real = imageio_ffmpeg.get_ffmpeg_exe()
        honest = f'case "$*" in *{but_for}*) exec "{real}" "$@";; esac\n' if but_for else ""
        binary = tmp_path / "bin" / "ffmpeg"
        binary.parent.mkdir()
        binary.write_text(f"#!/bin/sh\n{honest}{script}\n")
        binary.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(binary))

    return put
