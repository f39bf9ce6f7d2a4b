"""The configuration of the embedded queue."""

import secrets
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Where the queue keeps its rows and objects, who may use it, and its limits."""

    database_url: str = field(repr=False)  # sqlite:///file, or postgresql://user:password@…
    storage_dir: Path  # photos and videos; made if absent
    api_key: str | None = field(default=None, repr=False)  # None: loopback only, and no web page may call
    # Signs storage URLs. By default it is random, so that URLs become invalid when the process ends.
    signing_secret: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)
    public_url: str | None = None  # the URL that workers reach this server by; None: the Host of their request
    url_lifetime_s: int = 3600
    max_upload_bytes: int = 1024 * MIB  # one video
    max_photo_bytes: int = 50 * MIB
    retention_days: float | None = None  # tasks that ended longer ago are deleted with their files; None: none are
    beat_interval_s: float = 2.0  # how often workers are asked to say how far they are, for those who watch
    bucket: str = "group-photos"
