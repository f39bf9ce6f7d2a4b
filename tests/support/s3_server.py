"""A real S3 on loopback: rclone serves a folder, and checks signatures.

    with S3Server() as s3:
        boto3.client("s3", endpoint_url=s3.url, aws_access_key_id=s3.key_id, aws_secret_access_key=s3.secret,
                     region_name="us-east-1")
        s3.keys(), s3.object_bytes("clips/7.mp4")       without asking the server

A wrong secret or an altered presigned URL gets 403. Where it differs from AWS: an expired URL gets 400, with the code
AccessDenied as there; any region will do; keys with empty parts (`a//b`) are refused.
"""

import re
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Self

import httpx

from tests.support.processes import environment, until

RCLONE = Path(sysconfig.get_path("scripts")) / "rclone"
START_S = 20


class S3Server:
    """One bucket, empty at first, for the length of a block."""

    key_id = "AKIAOFFLINE"
    secret = "secret-of-the-offline-s3"

    def __init__(self, bucket: str = "videos") -> None:
        self.bucket = bucket
        self.url = ""
        self._folder = tempfile.TemporaryDirectory(prefix="s3-")
        self._home = Path(self._folder.name)
        self._objects = self._home / "buckets" / bucket
        self._popen: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        self._objects.mkdir(parents=True)
        flags = ["--addr", "127.0.0.1:0", "--auth-key", f"{self.key_id},{self.secret}", "--cache-dir", "cache"]
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                [RCLONE, "serve", "s3", *flags, "buckets"],
                cwd=self._home,
                env=environment(HOME=self._home, RCLONE_CONFIG=""),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self.url = until(self._address, START_S, "rclone says where it listens")
            until(self._is_open, START_S, "S3 answers")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._popen.kill()
        self._popen.wait(10)
        self._folder.cleanup()

    def object_bytes(self, key: str) -> bytes | None:
        """The content of an object; None when there is none."""
        path = self._objects / key
        return path.read_bytes() if path.is_file() else None

    def keys(self) -> list[str]:
        """Of all objects that are whole, in order."""
        paths = (path for path in self._objects.rglob("*") if path.is_file())
        return sorted(str(it.relative_to(self._objects)) for it in paths if not it.name.startswith(".rclone_temp_"))

    @property
    def _log(self) -> Path:
        return self._home / "rclone.log"

    def _address(self) -> str | None:
        log = self._log.read_text(errors="replace")
        assert self._popen.poll() is None, log
        found = re.search(r"Starting s3 server on \[(http://127\.0\.0\.1:\d+)/]", log)
        return found and found[1]

    def _is_open(self) -> bool:
        try:
            return httpx.get(self.url, timeout=5).status_code in {400, 403}  # unsigned, hence refused
        except httpx.TransportError:
            return False
