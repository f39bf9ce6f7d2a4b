"""What entry points build from settings, and what they refuse to build."""

import gc
import json
import stat
import threading

import anyio
import pytest
from structlog.testing import capture_logs

from inference.build.engines import build_engine, choose_engine, engine_note, refuse
from inference.build.extras import uncollected
from inference.build.queues import open_queue
from inference.build.server import build_server_config
from inference.build.workers import build_worker, open_events, usd_per_s
from inference.engines.preview import PreviewEngine
from inference.errors import InvalidRequest, NotWritable, SettingsError
from inference.leasing.scratch import scratch_folder
from inference.progress.events import CompletionEvent
from inference.settings import Settings
from inference.task import GenerationRequest
from inference.testing.memory_queue import MemoryQueue
from inference.testing.memory_store import MemoryStore
from tests.support.redis_server import redis_server


def test_the_signing_secret_is_made_once_and_kept_private(tmp_path):
    """URLs handed out before a restart work after it; nobody else on the machine can read the secret."""
    settings = Settings.isolated(data_dir=tmp_path / "data")
    first, second = build_server_config(settings), build_server_config(settings)
    assert first.signing_secret == second.signing_secret
    assert len(first.signing_secret) == 64
    assert stat.S_IMODE((tmp_path / "data" / "signing.key").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["signing.key"]


def test_servers_that_start_together_share_one_secret(tmp_path):
    """Whoever comes second takes what is there."""
    settings = Settings.isolated(data_dir=tmp_path)
    made, together = [], threading.Barrier(8)

    def start():
        together.wait()
        made.append(build_server_config(settings).signing_secret)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len(set(made)) == 1


@pytest.mark.parametrize("content", ["", "short\n"])
def test_a_file_without_a_secret_is_refused(tmp_path, content):
    """With an empty secret anybody could sign."""
    (tmp_path / "signing.key").write_text(content)
    with pytest.raises(SettingsError, match="no signing secret"):
        build_server_config(Settings.isolated(data_dir=tmp_path))


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    """By the name of its setting."""
    (tmp_path / "file").write_text("")
    with pytest.raises(NotWritable, match="I2V_DATA_DIR"):
        build_server_config(Settings.isolated(data_dir=tmp_path / "file" / "data"))
    queue = MemoryQueue(MemoryStore())
    with pytest.raises(SettingsError, match="TEMP_DIR"):
        build_worker(Settings.isolated(temp_dir=tmp_path / "file" / "temp"), queue, PreviewEngine())


@pytest.mark.anyio
async def test_a_worker_clears_away_what_was_left_unless_told_to_keep_it(tmp_path):
    """AUTO_CLEANUP_TEMP=false keeps the folders of earlier runs, too."""
    with scratch_folder(tmp_path, keep=True) as left:
        pass
    queue = MemoryQueue(MemoryStore())
    build_worker(Settings.isolated(temp_dir=tmp_path, auto_cleanup_temp=False), queue, PreviewEngine())
    assert left.exists()
    build_worker(Settings.isolated(temp_dir=tmp_path), queue, PreviewEngine())
    assert not left.exists()


def test_the_engine_is_the_one_named():
    """By I2V_ENGINE; one that is paid for has to have a key."""
    assert build_engine(Settings.isolated(engine="preview")).name == "preview"
    assert build_engine(Settings.isolated(engine="runway", runway_key="key")).name == "runway"
    with pytest.raises(SettingsError, match="RUNWAYML_API_SECRET"):
        build_engine(Settings.isolated(engine="runway"))


def test_a_size_that_the_model_does_not_make_is_refused_at_the_start():
    """Before a task is taken, which it would fail."""
    with pytest.raises(SettingsError, match=r"RUNWAY_DEFAULT_RATIO: gen4_turbo makes 1280:720, .* and not 16:9"):
        build_engine(Settings.isolated(engine="runway", runway_key="key", runway_ratio="16:9"))
    of_veo = {"runway_ratio": "1920:1080", "runway_model": "veo3.1"}
    assert build_engine(Settings.isolated(engine="runway", runway_key="key", **of_veo)).name == "runway"


@pytest.mark.parametrize(
    "given, engine",
    [
        ({"engine": "preview", "api_url": "https://app.example.com"}, "preview"),
        ({"engine": "wan", "api_url": "https://app.example.com", "runway_key": "key"}, "wan"),
        ({"runway_key": "key", "api_url": "https://app.example.com"}, "runway"),
        ({"runway_key": "key", "api_url": "http://localhost:3000"}, "runway"),
        ({"api_url": "http://127.0.0.1:8000"}, "preview"),
    ],
)
def test_an_engine_is_chosen(given, engine):
    """By name, else by the only key there is; a queue on this machine has previews by default."""
    assert choose_engine(Settings.isolated(**given)).engine == engine


def test_no_previews_where_nothing_was_chosen():
    """A queue elsewhere belongs to people who wait for their videos."""
    with pytest.raises(SettingsError, match=r"I2V_ENGINE is not set: .* https://app\.example\.com"):
        choose_engine(Settings.isolated(api_url="https://app.example.com"))


def test_what_the_engine_cannot_do_is_refused_before_it_is_loaded():
    """By the model that the task asks for."""
    settings = Settings.isolated(engine="runway", runway_model="gen4_turbo")
    refuse(settings, GenerationRequest(duration_s=10))
    with pytest.raises(InvalidRequest, match="duration_s"):
        refuse(settings, GenerationRequest(duration_s=10, provider="veo3.1"))
    assert "gen4_turbo: up to $0.05 a second, $10.00 a day" in engine_note(settings)


@pytest.mark.anyio
async def test_no_queue_without_an_address():
    """Said by the name of the setting."""
    with pytest.raises(SettingsError, match="VERCEL_API_URL"):
        async with open_queue(Settings.isolated()):
            pass


def test_a_worker_tells_redis_of_its_leases(tmp_path, photo_bytes):
    """All of it is there when the worker has ended, the end above all; with the price of the time that it took."""

    async def work():
        store = MemoryStore(clock=anyio.current_time)
        item = store.add(photo_bytes, "pan left", frame_num=13)
        async with open_events(settings) as hub:
            worker = build_worker(settings, MemoryQueue(store=store, worker_id="me"), PreviewEngine(), hub=hub)
            await worker.run(at_most=1)
        return item

    with redis_server(tmp_path) as server:
        settings = Settings.isolated(temp_dir=tmp_path / "temp", redis_url=server.url, gpu_usd_per_hour=3600)
        item = anyio.run(work)
        events = [json.loads(event) for event in server.events(item.group_id)]
    assert [event["type"] for event in events[:-1]] == ["progress"] * (len(events) - 1)
    assert events[0]["metadata"]["stage"] == "download"
    assert (events[-1]["type"], events[-1]["task_name"]) == ("completion", item.id)
    assert 0 < events[-1]["result"]["cost_usd"] < 60


def test_what_is_told_last_is_not_lost(tmp_path):
    """A process ends when all of it was sent, as far as Redis takes it."""

    async def tell():
        async with open_events(Settings.isolated(redis_url=server.url)) as hub:
            for number in range(900):
                hub.publish(CompletionEvent(project_id="p", task_name=str(number)))

    with redis_server(tmp_path) as server:
        anyio.run(tell)
        assert len(server.events("p")) == 900


@pytest.mark.parametrize("needed", [True, False])
def test_an_address_of_redis_that_is_none(needed):
    """A person at a terminal is told at once. A container that cannot tell of its leases runs them all the same."""

    async def opened():
        async with open_events(Settings.isolated(redis_url="http://secret@host"), needed=needed) as hub:
            return hub

    with capture_logs() as logs:
        if needed:
            with pytest.raises(SettingsError, match="REDIS_URL") as told:
                anyio.run(opened)
            assert "secret" not in str(told.value)
        else:
            assert anyio.run(opened) is None
            assert [(line["event"], "REDIS_URL" in line["error"]) for line in logs] == [("no_events", True)]
            assert "secret" not in str(logs)


@pytest.mark.parametrize(
    "given, told",
    [({}, None), ({"gpu_usd_per_hour": 3.6}, 0.001), ({"gpu_usd_per_hour": 3.6, "engine": "runway"}, None)],
)
def test_the_price_of_a_second(given, told):
    """Of engines that run here. A provider says itself what a clip costs."""
    assert usd_per_s(Settings.isolated(**given)) == (told if told is None else pytest.approx(told))


def test_a_large_import_is_not_collected():
    """The collector looks at nothing meanwhile, and not at what was imported later; afterwards it works as before."""

    def collections() -> list[int]:
        return [generation["collections"] for generation in gc.get_stats()]

    frozen, before = gc.get_freeze_count(), collections()
    try:
        with uncollected():
            objects = [[] for _ in range(20_000)]  # enough for dozens of collections
            assert collections() == before
        assert gc.isenabled()
        assert gc.get_freeze_count() >= frozen + len(objects)
    finally:
        gc.unfreeze()
