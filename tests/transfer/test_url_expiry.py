"""What presigned URLs say of their end: real signers, and text that is none."""

import base64
import json
import re
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.transfer.bucket import Bucket
from inference.transfer.url_expiry import ends_at, flaw

BASE = "https://example.com/clip.mp4"


def token(claims):
    """A JWT, unsigned: nobody here could tell."""
    return "e30." + base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=") + ".c2ln"


def test_of_our_own_bucket():
    """As boto3 signs it."""
    bucket = Bucket("https://s3.example.com", "clips", "key", "secret")
    left = ends_at(bucket.upload_url("a.mp4", content_type="video/mp4")) - datetime.now(UTC)
    assert timedelta(hours=23) < left <= timedelta(days=1)


@pytest.mark.parametrize(
    "query, end",
    [
        ("X-Amz-Date=20261121T220000Z&X-Amz-Expires=3600&X-Amz-Signature=a", datetime(2026, 11, 21, 23, tzinfo=UTC)),
        ("x-goog-date=20261121T220000Z&x-goog-expires=60", datetime(2026, 11, 21, 22, 1, tzinfo=UTC)),
        ("AWSAccessKeyId=a&Expires=1795298400&Signature=b", datetime(2026, 11, 21, 22, tzinfo=UTC)),
        (f"token={token({'url': 'videos/a.mp4', 'exp': 1795298400})}", datetime(2026, 11, 21, 22, tzinfo=UTC)),
        (f"token={token({'url': 'videos/a.mp4'})}", None),
        (f"token={token([1])}", None),
        ("token=opaque", None),
        ("token=a.b.c", None),
        ("X-Amz-Date=yesterday&X-Amz-Expires=3600", None),
        ("X-Amz-Expires=3600", None),
        ("X-Amz-Date=20261121T220000Z&X-Amz-Expires=99999999999999999", None),
        ("Expires=never", None),
        ("Expires=253402300799", datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
        ("expires=3600&sig=a", None),  # a duration
        (f"token={token({'exp': True})}", None),
        (f"token={token({'exp': 1795298400.5})}", datetime(2026, 11, 21, 22, 0, 0, 500000, tzinfo=UTC)),
        ("Expires=99999999999999999999", None),
        ("sv=2026-02-06&sp=cw&se=2026-11-21T22%3A00%3A00Z&sig=a", datetime(2026, 11, 21, 22, tzinfo=UTC)),
        ("sv=2026-02-06&sp=cw&se=2026-11-21T22%3A00Z&sig=a", datetime(2026, 11, 21, 22, tzinfo=UTC)),
        ("sv=2026-02-06&sp=cw&se=2026-11-21&sig=a", datetime(2026, 11, 21, tzinfo=UTC)),
        ("sv=2026-02-06&si=policy&sig=a", None),  # the end is in a policy that only the account knows
        ("sv=2026-02-06&se=soon&sig=a", None),
        ("se=2026-11-21", None),
        ("", None),
    ],
)
def test_of_others(query, end):
    """Read where it is said, and nothing is guessed."""
    assert ends_at(f"{BASE}?{query}") == end


def test_our_own_signatures_are_without_flaw():
    """They are checked like everybody's."""
    bucket = Bucket("https://s3.example.com", "clips", "key", "secret")
    assert flaw(bucket.upload_url("a.mp4", content_type="video/mp4")) is None


@pytest.mark.parametrize(
    "query, why",
    [
        ("X-Amz-SignedHeaders=host&X-Amz-Signature=a", None),
        ("X-Amz-SignedHeaders=content-length%3Bcontent-type%3Bhost&X-Amz-Content-Sha256=UNSIGNED-PAYLOAD", None),
        ("X-Goog-SignedHeaders=Content-Type%3Bhost", None),
        ("X-Amz-SignedHeaders=host%3Bx-amz-acl%3Bcontent-md5", r"not sent \(content-md5, x-amz-acl\)"),
        ("X-Amz-SignedHeaders=host%3Bx-amz-sdk-checksum-algorithm", "not sent"),
        ("X-Goog-SignedHeaders=host%3Bx-goog-content-length-range", "not sent"),
        # What AWS's JavaScript SDK signs by default since 3.729: the checksum of no body at all.
        ("X-Amz-SignedHeaders=host&x-amz-checksum-crc32=AAAAAA%3D%3D&x-amz-sdk-checksum-algorithm=CRC32", "checksum"),
        ("X-Amz-Checksum-Sha256=47DEQpj8HBSa%2B%2FTImW%2B5JCeuQeRkm5NMpJWZG3hSuFU%3D", "checksum of another body"),
        (f"X-Amz-SignedHeaders=host&X-Amz-Content-Sha256={'e3b0c442' * 8}", "checksum of another body"),
        ("sv=2026-02-06&sr=b&sp=cw&se=2099-01-01&sig=a", None),
        ("sv=2026-02-06&si=policy&sig=a", None),
        ("sv=2026-02-06&sr=b&sp=r&se=2099-01-01&sig=a", "for reading alone"),
        ("token=opaque", None),
        ("sp=r&sig=a", None),
        ("", None),
    ],
)
def test_what_can_never_be_stored_is_known_before(query, why):
    """Nothing is guessed: a flaw is a promise of the signature that an upload of ours would break."""
    told = flaw(f"{BASE}?{query}")
    assert told is None if why is None else re.search(why, told)


NAMES = ["X-Amz-Expires", "X-Amz-Date", "Expires", "token", "x", "X-Amz-SignedHeaders", "se", "sv", "sig", "sp"]


@given(st.dictionaries(st.sampled_from(NAMES), st.text()))
def test_any_query_is_one(query):
    """Whoever calls writes it: it never raises."""
    url = str(httpx.URL(BASE, params=query))
    assert (ends_at(url) is None and flaw(url) is None) or query


@given(st.recursive(st.none() | st.floats() | st.text(), lambda inner: st.dictionaries(st.just("exp"), inner)))
def test_any_token_is_one(claims):
    """Nor does what is in it."""
    ends_at(f"{BASE}?token={token(claims)}")
