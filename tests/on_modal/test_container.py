"""What a container on Modal opens; what it does with leases is in test_deployment.py."""

import anyio
import pytest

from inference.on_modal.container import open_warm_worker
from inference.payments.records import MemoryRecords
from inference.progress.redis import RedisHub
from inference.settings import Settings


@pytest.mark.parametrize(
    "url, hub", [(None, type(None)), ("redis://127.0.0.1:1/0", RedisHub), ("nonsense", type(None))]
)
def test_a_container_tells_where_a_redis_is_set(tmp_path, url, hub):
    """One that is away is no reason not to start, and neither is an address that is none: another container would
    start with the same secret.
    """

    async def opened():
        settings = Settings.isolated(temp_dir=tmp_path, api_url="http://127.0.0.1:1", api_key="k", redis_url=url)
        async with open_warm_worker(settings, "gpu", "preview", MemoryRecords()) as worker:
            return worker._runner._hub

    assert isinstance(anyio.run(opened), hub)
