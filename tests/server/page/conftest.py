"""Sites to look at."""

import pytest

from tests.server.harness import KEY, app_client, config
from tests.server.page.site import Site


@pytest.fixture
def site(tmp_path):
    """An empty queue, seen with the key."""
    with app_client(config(tmp_path), authorization=f"Worker {KEY}") as client:
        yield Site(client)
