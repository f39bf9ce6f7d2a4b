"""What all tests share."""

import pytest
import structlog

from inference.settings import Settings
from tests.simulation import PHOTO


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
