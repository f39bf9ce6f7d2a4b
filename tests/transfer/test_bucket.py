"""Where videos of a bucket go: endpoints as dashboards show them, and a real S3 that checks signatures."""

import httpx
import pytest

from inference.transfer.bucket import Bucket, bucket_named_in
from inference.transfer.storage import Storage
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "endpoint, path",
    [
        ("https://ref.supabase.co/storage/v1/s3", "/storage/v1/s3/clips/a.mp4"),
        ("https://ref.storage.supabase.co/storage/v1/s3/", "/storage/v1/s3/clips/a.mp4"),
        ("https://0123.r2.cloudflarestorage.com/clips", "/clips/a.mp4"),
        ("https://0123.r2.cloudflarestorage.com/clips/", "/clips/a.mp4"),
        ("https://s3.eu-central-1.amazonaws.com", "/clips/a.mp4"),
        ("https://clips.s3.eu-central-1.amazonaws.com/", "/clips/a.mp4"),
        ("https://box.example/minio/clips", "/minio/clips/clips/a.mp4"),  # not for us to know better
    ],
)
def test_the_path_of_an_endpoint_is_kept(endpoint, path):
    """Only the bucket is left out, where it stands alone: it follows anyway."""
    bucket = Bucket(endpoint, "clips", "key", "secret")
    for url in (bucket.upload_url("a.mp4", content_type="video/mp4"), bucket.download_url("a.mp4")):
        assert httpx.URL(url).raw_path.partition(b"?")[0].decode() == path
    assert url.startswith(f"{bucket.origin}/")


@pytest.mark.parametrize(
    "endpoint, name",
    [
        ("https://clips.s3.eu-central-1.amazonaws.com", "clips"),
        ("https://my.clips.s3-eu-west-1.amazonaws.com/", "my.clips"),
        ("https://clips.s3.amazonaws.com", "clips"),
        ("https://0123.r2.cloudflarestorage.com/clips/", "clips"),
        ("https://s3.eu-central-1.amazonaws.com", None),
        ("https://0123.r2.cloudflarestorage.com", None),
        ("https://ref.supabase.co/storage/v1/s3", None),
    ],
)
def test_an_endpoint_may_name_the_bucket(endpoint, name):
    """As workers of RunPod's Hub are told theirs, who have no BUCKET_NAME."""
    assert bucket_named_in(endpoint) == name
    if name:
        assert Bucket(endpoint, name, "key", "secret").object_url("a/b.mp4").endswith(f"/{name}/a/b.mp4")


async def test_a_storage_behind_a_path_takes_what_was_signed(tmp_path):
    """The path is part of the signature, which a real S3 verifies: to this one the path is a bucket of its own."""
    (tmp_path / "clip.mp4").write_bytes(b"clip")
    with S3Server(bucket="storage") as s3:
        bucket = Bucket(f"{s3.url}/storage/v1/s3", "clips", s3.key_id, s3.secret)
        async with Storage(trusted_origins=[bucket.origin]) as storage:
            await storage.upload(bucket.upload_url("a b.mp4", content_type="video/mp4"), tmp_path / "clip.mp4")
            await storage.download(bucket.download_url("a b.mp4"), tmp_path / "back.mp4")
        assert s3.keys() == ["v1/s3/clips/a b.mp4"]
    assert (tmp_path / "back.mp4").read_bytes() == b"clip"
