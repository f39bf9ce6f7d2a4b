"""An S3-compatible bucket for the videos of direct requests.

Only URLs are signed here, with no request made: bytes travel as for every other presigned URL, through `storage`.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import httpx

from inference.errors import SettingsError

UPLOAD_S = 86_400
"""How long an upload URL holds. It is signed before the GPU is used, and needed when the video is made, after other
jobs and retries. A day is how long RunPod keeps a job unless told otherwise (its ttl)."""

DOWNLOAD_S = 7 * 86_400
"""How long the URL in an answer holds: the maximum of SigV4."""

DEFAULT_REGION = "us-east-1"
"""Accepted by storages without regions (MinIO, R2, Spaces)."""


@dataclass(frozen=True)
class Bucket:
    """One bucket, with a key that may write to it."""

    endpoint_url: str  # https://s3.eu-central-1.amazonaws.com; may name the bucket, too
    name: str
    key_id: str
    secret: str = field(repr=False)
    region: str | None = None  # None: the one in the endpoint's name

    @property
    def origin(self) -> str:
        """Scheme, host and port of the storage."""
        url = httpx.URL(self.endpoint_url)
        return f"{url.scheme}://{url.netloc.decode('ascii').removeprefix(f'{self.name}.')}"

    @property
    def endpoint(self) -> str:
        """The base of signed URLs, to which paths of objects are appended. Supabase's ends in `/storage/v1/s3`.

        R2's dashboard shows endpoints with the bucket as their path. That path is dropped: boto3 appends the bucket.
        """
        path = httpx.URL(self.endpoint_url).raw_path.partition(b"?")[0].decode("ascii").rstrip("/")
        return self.origin + ("" if path == f"/{self.name}" else path)

    def upload_url(self, key: str, *, content_type: str) -> str:
        """A presigned PUT for an object of this type. Raises SettingsError."""
        return self._signed("put_object", key, UPLOAD_S, ContentType=content_type)

    def download_url(self, key: str) -> str:
        """A presigned GET that holds for a week. Raises SettingsError."""
        return self._signed("get_object", key, DOWNLOAD_S)

    def object_url(self, key: str) -> str:
        """The URL without a signature, for who has a key of their own, or where everybody may read."""
        return f"{self.endpoint}/{self.name}/{key}"

    def _signed(self, operation: str, key: str, expires_s: int, **parameters: Any) -> str:
        try:
            import boto3  # noqa: PLC0415 - an extra
            import botocore.config  # noqa: PLC0415
            import botocore.exceptions  # noqa: PLC0415
        except ImportError:
            raise SettingsError("S3 storage needs an extra: pip install 'serverless-i2v[s3]'") from None
        try:
            client = boto3.client(
                "s3",
                endpoint_url=self.endpoint,
                aws_access_key_id=self.key_id,
                aws_secret_access_key=self.secret,
                region_name=self.region or _region_of(self.origin),
                # Every storage accepts the bucket in the path; in the host name only those with a certificate for it.
                config=botocore.config.Config(signature_version="s3v4", s3={"addressing_style": "path"}),
            )
            return str(
                client.generate_presigned_url(
                    operation, Params={"Bucket": self.name, "Key": key, **parameters}, ExpiresIn=expires_s
                )
            )
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise SettingsError(f"the S3 storage: {error}") from None


def bucket_named_in(endpoint_url: str) -> str | None:
    """The bucket that an endpoint names, as RunPod's own workers are told theirs; None where it names none.

    R2's dashboard shows it as the path, AWS as the first part of the host.
    """
    url = httpx.URL(endpoint_url)
    if path := url.path.strip("/"):
        return None if "/" in path else path
    found = re.fullmatch(r"(.+?)\.s3(?:[.-].+)?\.amazonaws\.com(?:\.cn)?", url.host)
    return found[1] if found else None


def _region_of(origin: str) -> str:
    """`eu-central-1` of https://s3.eu-central-1.amazonaws.com, and of similar names at other providers."""
    found = re.search(r"(?://|\.)s3[.-](?:dualstack\.)?([a-z0-9-]+)\.[^/.]+\.", origin)
    return found[1] if found else DEFAULT_REGION
