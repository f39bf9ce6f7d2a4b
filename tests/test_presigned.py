"""What presigned URLs say of their end: real signers, and text that is none."""

import base64
import json
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.bucket import Bucket
from inference.presigned import ends_at

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
        ("", None),
    ],
)
def test_of_others(query, end):
    """Read where it is said, and nothing is guessed."""
    assert ends_at(f"{BASE}?{query}") == end


@given(st.dictionaries(st.sampled_from(["X-Amz-Expires", "X-Amz-Date", "Expires", "token", "x"]), st.text()))
def test_any_query_is_one(query):
    """Whoever calls writes it: it never raises."""
    assert ends_at(str(httpx.URL(BASE, params=query))) is None or query


@given(st.recursive(st.none() | st.floats() | st.text(), lambda inner: st.dictionaries(st.just("exp"), inner)))
def test_any_token_is_one(claims):
    """Nor does what is in it."""
    ends_at(f"{BASE}?token={token(claims)}")
