"""What the embedded queue server is told, made from settings."""

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from inference import private
from inference.build.extras import needing_extra
from inference.errors import SettingsError, write_error
from inference.settings import Settings

if TYPE_CHECKING:
    from inference.server.config import ServerConfig


SIGNING_SECRET_CHARS = 64
"""Hexadecimal: 256 bits, as much as the HMAC-SHA256 it keys."""


def build_server_config(settings: Settings) -> "ServerConfig":
    """What the embedded queue server is told. Makes its folder. Raises SettingsError, MachineFault."""
    with needing_extra("server", "the queue server"):
        from inference.server.config import ServerConfig  # noqa: PLC0415
    data_dir = settings.data_dir.absolute()
    try:
        private.make_folder(data_dir, "queue.db*", "signing.key", "objects")
        signing_secret = _signing_secret(data_dir / "signing.key")
    except OSError as error:
        raise write_error(error, f"I2V_DATA_DIR: {data_dir} cannot be written: {error.strerror}") from None
    database_url = (
        settings.database_url.get_secret_value() if settings.database_url else f"sqlite:///{data_dir}/queue.db"
    )
    return ServerConfig(
        database_url=database_url,
        storage_dir=data_dir / "objects",
        api_key=settings.api_key.get_secret_value() if settings.api_key else None,
        signing_secret=signing_secret,
        public_url=settings.public_url,
        max_upload_bytes=settings.max_video_bytes,
        max_photo_bytes=settings.max_photo_bytes,
        retention_days=settings.retention_days,
    )


def _signing_secret(path: Path) -> str:
    """Kept in a file, so that URLs handed out before a restart work after it.

    Raises SettingsError for a file that holds no secret: an empty one would let anybody sign.
    """
    if not path.exists():
        # Linked into place when it is whole: neither a crash nor a second server at once leaves half a secret.
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:
            file.write(secrets.token_hex(SIGNING_SECRET_CHARS // 2))
            file.flush()
            os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(file.name, path)
    private.close(path)
    secret = path.read_text().strip()
    if len(secret) < SIGNING_SECRET_CHARS:
        raise SettingsError(f"{path} holds no signing secret; remove it, and a new one is made")
    return secret
