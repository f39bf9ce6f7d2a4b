"""The Runway engine against a Runway on loopback: its contract, its wire, and above all that it pays once."""

import io
import itertools
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import httpx
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image
from structlog.testing import capture_logs

from inference.engines.base import Job
from inference.engines.runway import paid as runway_paid
from inference.engines.runway.engine import RunwayEngine
from inference.engines.runway.models import MODELS, Model, model_for
from inference.engines.runway.paid import Order, PaidTask
from inference.engines.runway.wire import RunwayApi
from inference.errors import (
    AccountError,
    AddressRefused,
    BudgetSpent,
    CancelRequested,
    ContentRefused,
    DiskFull,
    EngineFailed,
    EngineHung,
    InvalidRequest,
    LeaseLost,
    MediaError,
    PaymentInDoubt,
    ProviderUnavailable,
    RecordsUnavailable,
    SettingsError,
    StorageRefused,
)
from inference.leasing.retry import Policy
from inference.leasing.runner import Runner
from inference.media.video import VideoWriter, probe
from inference.payments import ledger as ledgers
from inference.payments.ledger import Ledger
from inference.payments.records import MemoryRecords
from inference.progress.stages import StageTracker, plan
from inference.task import GenerationRequest
from inference.testing.memory_queue import MemoryQueue
from inference.testing.memory_store import MemoryStore
from tests.engines.contract import EngineContract, landscape
from tests.support.disk import small_disk
from tests.support.runway_server import (
    BAD_GATEWAY,
    CRASHED_AFTER,
    DAILY_CAP,
    DROPPED,
    GATEWAY_TIMEOUT,
    HANGS,
    HANGS_AFTER,
    MALFORMED,
    NO_CREDITS,
    NOT_FOUND,
    REPLY_LOST,
    SLOW,
    UNAVAILABLE,
    WITHOUT_ID,
    Fault,
    RunwayServer,
    unknown_status,
)
from tests.support.virtual import virtual_time

POLL_S = 0.01
CASES = Path(__file__).parents[2] / "cases" / "video"
ASKED = GenerationRequest(prompt="slow push", duration_s=5.0)

pytestmark = pytest.mark.anyio


@pytest.fixture
def runway():
    """A Runway that works."""
    with RunwayServer() as server:
        yield server


@pytest.fixture
def photo(tmp_path):
    """A small landscape photo."""
    return landscape(tmp_path / "photo.jpg")


@pytest.fixture
def folder(tmp_path):
    """The lease's own folder, empty."""
    (tmp_path / "lease").mkdir()
    return tmp_path / "lease"


def engine_of(runway: RunwayServer, **options) -> RunwayEngine:
    """An engine that does not wait for long."""
    options = {"poll_interval_s": POLL_S, "trusted_origins": [runway.url]} | options
    return RunwayEngine(options.pop("key", runway.key), base_url=runway.url, **options)


class Books:
    """A ledger, and the jobs of one item after the other."""

    def __init__(self, records=None, **options) -> None:
        self.records = records or MemoryRecords()
        self.ledger = Ledger(self.records, **options)
        self.leases = itertools.count()

    def job(self, **options) -> Job:
        """A new lease of the item."""
        return Job(None, self.ledger.purchase("item-1", f"worker.{next(self.leases)}"), **options)

    async def statuses(self) -> list[str]:
        """What became of every payment."""
        return [payment.status for payment in await self.ledger.payments()]


@contextmanager
def failing(kind: type[Exception], runway: RunwayServer, match: str | None = None) -> Iterator[pytest.ExceptionInfo]:
    """An error of exactly this kind: one line that says where it comes from, without keys and queries."""
    with pytest.raises(kind, match=match) as caught:
        yield caught
    said = str(caught.value)
    assert type(caught.value) is kind
    assert said.startswith("Runway: ")
    assert "\n" not in said
    assert runway.key not in said
    assert "_jwt" not in said


class TestRunway(EngineContract):
    """What every engine must do."""

    makes_its_own_size = False
    unsupported_duration_s = 0.4

    @pytest.fixture(autouse=True)
    def _server(self, runway):
        self.runway = runway

    def make(self) -> RunwayEngine:
        """An engine of the test's own Runway."""
        return engine_of(self.runway)


class TestModels:
    """What each model takes, without asking anybody."""

    @pytest.mark.parametrize(
        "hint, name",
        [
            (None, "gen4.5"),
            ("", "gen4.5"),
            ("wan_local", "gen4.5"),
            ("gen4_turbo", "gen4_turbo"),
            ("runway_gen4_turbo", "gen4_turbo"),
            ("gen3a_turbo", "gen4_turbo"),
            ("gen4.5_turbo", "gen4.5"),
            ("runway_veo3.1", "veo3.1"),
            ("veo3", "veo3.1"),
            ("veo3.1_fast", "veo3.1_fast"),
        ],
    )
    async def test_a_hint_names_a_model(self, hint, name):
        """As the queue calls them; what is not Runway's goes to the default."""
        assert model_for(hint, "gen4.5").name == name

    async def test_nothing_is_ordered_for_a_hint_that_nobody_knows(self, runway, photo, folder):
        """It may be at another provider, and here it would cost money."""
        request = ASKED.model_copy(update={"provider": "comfyui"})
        with pytest.raises(InvalidRequest, match="provider is 'comfyui', which this version does not know"):
            await engine_of(runway).generate(request, {"photo": photo}, folder, Job())
        assert runway.tasks == []

    @pytest.mark.parametrize(
        "model, asked_s, ordered_s, cut_s",
        [
            ("gen4_turbo", 5.0, 5, None),
            ("gen4_turbo", 121 / 24, 5, None),
            ("gen4_turbo", 10.0, 10, None),
            ("gen4_turbo", 241 / 24, 10, None),
            ("gen4_turbo", 0.5, 2, 0.5),
            ("gen4_turbo", 4.5, 5, 4.5),
            ("veo3.1", 5.0, 6, 5.0),
            ("veo3.1", 4.0, 4, None),
            ("veo3.1_fast", 6.5, 8, 6.5),
        ],
    )
    async def test_seconds_are_whole_and_never_too_few(self, model, asked_s, ordered_s, cut_s):
        """Frames as the queue counts them are one more than the seconds hold."""
        assert MODELS[model].billed_seconds(asked_s) == ordered_s
        assert type(MODELS[model].billed_seconds(asked_s)) is int
        assert MODELS[model].cut_s(asked_s) == cut_s

    @pytest.mark.parametrize(
        "model, asked_s", [("gen4_turbo", 10.1), ("veo3.1", 8.1), ("veo3.1", 10.0), ("gen4.5", 0.4)]
    )
    async def test_other_lengths_are_refused(self, model, asked_s):
        """With what it makes."""
        with pytest.raises(InvalidRequest, match=f"duration_s is {asked_s:g}; {model} makes 0.5 to"):
            MODELS[model].billed_seconds(asked_s)

    @pytest.mark.parametrize(
        "size, gen4, veo",
        [
            ((4000, 3000), "1104:832", "1280:720"),
            ((3000, 4000), "832:1104", "720:1280"),
            ((1920, 1080), "1280:720", "1280:720"),
            ((1080, 1920), "720:1280", "720:1280"),
            ((500, 500), "960:960", "1280:720"),
            ((2100, 900), "1584:672", "1280:720"),
        ],
    )
    async def test_the_nearest_shape_is_taken(self, size, gen4, veo):
        """By ratio, not by difference: 2:1 is as far from 1:1 as 1:2 is."""
        assert MODELS["gen4_turbo"].nearest_ratio(*size) == gen4
        assert MODELS["veo3.1"].nearest_ratio(*size) == veo

    async def test_prices(self):
        """Dollars, at most."""
        assert MODELS["gen4_turbo"].cost_usd(5.0, audio=True) == pytest.approx(0.25)  # it makes none
        for model, audio, cost_usd in (
            ("veo3.1", False, 1.20), ("veo3.1", True, 2.40), ("veo3.1_fast", False, 0.60), ("veo3.1_fast", True, 0.90)
        ):  # fmt: skip
            assert MODELS[model].cost_usd(5.0, audio=audio) == pytest.approx(cost_usd)

    @pytest.mark.parametrize(
        "field, value",
        [
            ("prompt", "a" * 1001),
            ("prompt", "🦊" * 501),
            ("seed", 2**32),
            ("negative_prompt", "blur"),
            ("steps", 4),
            ("guidance", 3.0),
            ("duration_s", 11.0),
        ],
    )
    async def test_what_cannot_be_done_costs_nothing(self, runway, photo, folder, field, value):
        """The field is named, and nothing was asked of Runway."""
        request = ASKED.model_copy(update={field: value})
        with failing(InvalidRequest, runway, field):
            await engine_of(runway).generate(request, {"photo": photo}, folder, Job())
        assert runway.requests == []

    async def test_a_last_photo_or_a_workflow_costs_nothing(self, runway, photo, folder):
        """Neither can be done there; nothing was asked of Runway."""
        with failing(InvalidRequest, runway, "last_photo"):
            await engine_of(runway).generate(ASKED, {"photo": photo, "last_photo": photo}, folder, Job())
        with failing(InvalidRequest, runway, "workflow"):
            await engine_of(runway).generate(ASKED.model_copy(update={"workflow": {}}), {}, folder, Job())
        assert runway.requests == []

    async def test_a_prompt_of_the_longest_is_taken(self, runway, photo, folder):
        """Counted in UTF-16 code units, of which an emoji has two; not cut."""
        request = ASKED.model_copy(update={"prompt": "🦊" * 500})
        await engine_of(runway).generate(request, {"photo": photo}, folder, Job())
        assert runway.tasks[0].prompt == "🦊" * 500

    async def test_a_model_nobody_knows_is_a_mistake_of_the_settings(self):
        """Said when the engine is made."""
        with pytest.raises(SettingsError, match="RUNWAY_MODEL"):
            RunwayEngine("key", model="gen9")


class TestOrder:
    """What arrives at Runway, which refuses whatever its documents do not have."""

    async def test_an_order_is_what_was_asked_for(self, runway, photo, folder):
        """Model, whole seconds, the size of the photo's shape, prompt, seed."""
        request = ASKED.model_copy(update={"seed": 7, "provider": "runway_gen4_turbo"})
        video = await engine_of(runway, model="gen4.5").generate(request, {"photo": photo}, folder, Job())
        [task] = runway.tasks
        assert (task.model, task.seconds, task.ratio) == ("gen4_turbo", 5, "1280:720")
        assert (task.prompt, task.seed) == ("slow push", 7)
        assert video.external_ids == {"runway_task_id": task.id}
        assert (video.cost_usd, video.seed) == (pytest.approx(0.25), 7)

    @pytest.mark.parametrize("model, silent_usd, sound_usd", [("veo3.1", 1.20, 2.40), ("veo3.1_fast", 0.60, 0.90)])
    async def test_sound_is_bought_only_where_it_is_wanted(
        self, runway, photo, folder, *, model, silent_usd, sound_usd
    ):
        """Every other engine is silent. The books have the price of what was ordered, before and after."""
        for audio, cost_usd in ((False, silent_usd), (True, sound_usd)):
            books = Books(budget_usd=cost_usd)  # enough, and not a cent more
            video = await engine_of(runway, model=model, audio=audio).generate(
                ASKED, {"photo": photo}, folder, books.job()
            )
            assert (runway.tasks[-1].audio, video.cost_usd) == (audio, pytest.approx(cost_usd))
            with failing(BudgetSpent, runway, rf"this would cost \${cost_usd:.2f}"):
                other = ASKED.model_copy(update={"prompt": "another"})
                await engine_of(runway, model=model, audio=audio).generate(other, {"photo": photo}, folder, books.job())

    async def test_a_silent_model_has_no_say_in_sound(self, runway, photo, folder):
        """Runway refuses a key that the model does not have."""
        await engine_of(runway, audio=True).generate(ASKED, {"photo": photo}, folder, Job())
        assert not runway.tasks[0].audio

    @pytest.mark.parametrize("said, sent", [("blur, text ", "blur, text"), ("", None), (None, None)])
    async def test_what_should_not_be_seen(self, runway, photo, folder, said, sent):
        """Veo takes it; it is part of what was paid for."""
        request = ASKED.model_copy(update={"negative_prompt": said})
        books, engine = Books(), engine_of(runway, model="veo3.1_fast")
        await engine.generate(request, {"photo": photo}, folder, books.job())
        assert runway.tasks[0].negative_prompt == sent
        await engine.generate(ASKED, {"photo": photo}, folder, books.job())
        assert len(runway.tasks) == (2 if sent else 1)

    @pytest.mark.parametrize("names_duration, seconds", [(True, 5), (False, 8)])
    async def test_a_length_of_our_own_for_who_names_none(self, runway, photo, folder, names_duration, seconds):
        """RUNWAY_DEFAULT_DURATION; what was asked for stays as it is."""
        request = ASKED.model_copy(update={"names_duration": names_duration})
        await engine_of(runway, default_duration_s=8).generate(request, {"photo": photo}, folder, Job())
        assert runway.tasks[0].seconds == seconds

    @pytest.mark.parametrize("model, sent", [("gen4_turbo", False), ("veo3.1", False), ("gen4.5", True)])
    async def test_no_prompt(self, runway, photo, folder, model, sent):
        """None is sent, or a default where Runway takes no order without."""
        request = ASKED.model_copy(update={"prompt": "  "})
        await engine_of(runway, model=model).generate(request, {"photo": photo}, folder, Job())
        assert bool(runway.tasks[0].prompt) is sent

    async def test_a_configured_size(self, runway, photo, folder):
        """Whatever the shape of the photo; a task whose own model does not make it gets the nearest to its photo."""
        await engine_of(runway, ratio="960:960").generate(ASKED, {"photo": photo}, folder, Job())
        veo = ASKED.model_copy(update={"provider": "veo3.1"})
        await engine_of(runway, ratio="960:960").generate(veo, {"photo": photo}, folder, Job())
        assert runway.tasks[0].ratio == "960:960"
        assert runway.tasks[1].ratio in MODELS["veo3.1"].ratios

    async def test_a_model_that_is_gone_is_told_once(self, runway, photo, folder):
        """And another takes its place."""
        engine = engine_of(runway)
        request = ASKED.model_copy(update={"provider": "gen3a_turbo"})
        with capture_logs() as logs:
            await engine.generate(request, {"photo": photo}, folder, Job())
            await engine.generate(request, {"photo": photo}, folder, Job())
        told = [line for line in logs if line["event"] == "model_gone"]
        assert [(line["asked_for"], line["used"]) for line in told] == [("gen3a_turbo", "gen4_turbo")]

    async def test_a_photo_is_upright_and_says_nothing_of_its_maker(self, runway, tmp_path, folder):
        """Where it was taken stays here."""
        exif = Image.Exif()
        exif[0x0112] = 6
        exif[0x010F] = "a camera"
        path = tmp_path / "sideways.jpg"
        with Image.open(landscape(tmp_path / "stored.jpg")) as image:
            image.save(path, exif=exif)
        await engine_of(runway).generate(ASKED, {"photo": path}, folder, Job())
        [task] = runway.tasks
        with Image.open(io.BytesIO(task.photo)) as sent:
            assert (sent.size, dict(sent.getexif()), sent.format) == ((180, 320), {}, "JPEG")
        assert b"a camera" not in task.photo
        assert task.ratio == "720:1280"

    @pytest.mark.parametrize(
        "size, sent", [((1000, 300), (600, 300)), ((300, 1000), (300, 600)), ((5000, 4000), (4096, 3277))]
    )
    async def test_a_photo_of_an_odd_shape_fits(self, runway, tmp_path, folder, size, sent):
        """Runway refuses more than 2:1, and needs no more pixels than it makes."""
        path = tmp_path / "odd.png"
        Image.new("RGBA", size, (20, 90, 160, 128)).save(path)
        await engine_of(runway).generate(ASKED, {"photo": path}, folder, Job())
        with Image.open(io.BytesIO(runway.tasks[0].photo)) as image:
            assert image.size == sent

    async def test_a_large_photo_is_uploaded_first(self, runway, tmp_path, folder):
        """No photo is refused for its size; the form's address does not get the key."""
        path = tmp_path / "noise.png"
        noise = np.random.default_rng(0).integers(0, 256, (1500, 1800, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, compress_level=1)
        await engine_of(runway).generate(ASKED, {"photo": path}, folder, Job())
        assert (runway.asked("upload"), runway.asked("form"), runway.asked("create")) == (1, 1, 1)
        assert runway.tasks[0].photo_uri.startswith("runway://")
        assert len(runway.tasks[0].photo) > 4_000_000

    @pytest.mark.parametrize(
        "call, fault",
        [("upload", UNAVAILABLE), ("upload", DROPPED), ("upload", MALFORMED), ("form", UNAVAILABLE), ("form", DROPPED)],
    )
    async def test_an_upload_that_fails_costs_nothing(self, runway, tmp_path, folder, call, fault):
        """It is tried again, then the task is handed back: nothing was ordered."""
        path = tmp_path / "noise.png"
        noise = np.random.default_rng(0).integers(0, 256, (1500, 1800, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, compress_level=1)
        runway.faults[call] += [fault] * 4
        books = Books()
        with failing(ProviderUnavailable, runway):
            await engine_of(runway).generate(ASKED, {"photo": path}, folder, books.job())
        assert (runway.tasks, await books.statuses(), runway.asked(call)) == ([], [], 4)

    @pytest.mark.parametrize("seconds, frames", [(5.0, 120), (4.0, 96), (0.5, 12)])
    async def test_a_clip_is_cut_to_the_frame(self, runway, photo, folder, seconds, frames):
        """Veo makes 4, 6 or 8 s: what is beyond the length asked for goes."""
        request = ASKED.model_copy(update={"duration_s": seconds, "provider": "veo3.1"})
        video = await engine_of(runway).generate(request, {"photo": photo}, folder, Job())
        assert (video.frames, probe(video.path).frames) == (frames, frames)
        assert (video.fps, runway.tasks[0].seconds) == (pytest.approx(24), 6 if seconds == 5 else 4)

    async def test_progress_comes_from_runway(self, runway, photo, folder):
        """Through the stages of a lease, up to the whole."""
        runway.running_looks = 4
        heard = []
        tracker = StageTracker(plan(RunwayEngine.stages), heard.append)
        await engine_of(runway).generate(ASKED, {"photo": photo}, folder, Job(tracker))
        generated = [it.done for it in heard if it.stage == "generate"]
        assert generated == sorted(generated)
        assert len(set(generated)) > 3
        assert generated[-1] == 1


class TestPaying:
    """An order is paid for once, whatever is lost on the way."""

    @pytest.mark.parametrize(
        "fault, made",
        [
            (REPLY_LOST, 1),
            (CRASHED_AFTER, 1),
            (MALFORMED, 1),
            (WITHOUT_ID, 1),
            (HANGS_AFTER, 1),
            (DROPPED, 0),
            (Fault(500), 0),
            (Fault(408), 0),
            (HANGS, 0),
        ],
    )
    async def test_an_answer_that_is_lost_is_left_to_a_person(self, runway, photo, folder, *, monkeypatch, fault, made):
        """Whether the order was carried out cannot be told from here: not again, by nobody, until somebody looked."""
        monkeypatch.setattr(runway_paid, "CREATION_LIMIT_S", 0.5)
        monkeypatch.setattr(ledgers, "CREATION_S", 0.0)
        runway.faults["create"].append(fault)
        books, engine = Books(), engine_of(runway)
        for _ in range(2):  # under this lease, and the next
            with failing(PaymentInDoubt, runway, r"\$0.25.*i2v payments --forget item-1"):
                await engine.generate(ASKED, {"photo": photo}, folder, books.job())
        assert (runway.asked("create"), len(runway.tasks)) == (1, made)
        assert await books.statuses() == ["intended"]
        assert (await books.ledger.forget("item-1")).cost_usd == pytest.approx(0.25)
        await engine.generate(ASKED, {"photo": photo}, folder, books.job())
        assert await books.statuses() == ["in_doubt", "created"]
        assert await books.ledger.spent_usd() == pytest.approx(0.50)

    async def test_one_replay_where_the_operator_said_so(self, runway, photo, folder, monkeypatch):
        """And no more than that, whoever holds the lease."""
        monkeypatch.setattr(ledgers, "CREATION_S", 0.0)
        books, engine = Books(), engine_of(runway, replays=1)
        runway.faults["create"] += [REPLY_LOST, REPLY_LOST]
        for _ in range(2):
            with failing(PaymentInDoubt, runway):
                await engine.generate(ASKED, {"photo": photo}, folder, books.job())
        assert runway.asked("create") == 2
        assert await books.statuses() == ["in_doubt", "intended"]

    async def test_a_replay_that_is_answered(self, runway, photo, folder):
        """Both payments are in the books."""
        books = Books()
        runway.faults["create"].append(DROPPED)
        await engine_of(runway, replays=1).generate(ASKED, {"photo": photo}, folder, books.job())
        assert await books.statuses() == ["in_doubt", "created"]
        assert len(runway.tasks) == 1

    @pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
    async def test_the_next_lease_goes_on_with_what_was_paid_for(self, runway, photo, folder):
        """A worker that stops leaves the task running."""
        books = Books()
        runway.hold()
        with anyio.move_on_after(30) as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(engine_of(runway).generate, ASKED, {"photo": photo}, folder, books.job())
                await until(lambda: runway.asked("poll") > 1)
                scope.cancel()
        assert (await books.statuses(), runway.asked("delete")) == (["created"], 0)
        runway.release()
        video = await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())
        assert (len(runway.tasks), video.external_ids["runway_task_id"]) == (1, runway.tasks[0].id)
        assert await books.statuses() == ["created"]  # the queue has not accepted the video yet

    @pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
    async def test_an_order_in_flight_is_heard_out(self, runway, photo, folder):
        """Stopped in the middle of it, a worker waits for the id and writes it down."""
        books = Books()
        runway.faults["create"].append(SLOW)
        with anyio.move_on_after(30) as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(engine_of(runway).generate, ASKED, {"photo": photo}, folder, books.job())
                await until(lambda: runway.tasks)
                scope.cancel()
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.1)
                    assert await books.statuses() == ["intended"]
                runway.release_hanging()
        [payment] = await books.ledger.payments()
        assert (payment.status, payment.external_id) == ("created", runway.tasks[0].id)
        assert runway.asked("poll") == 0

    async def test_another_prompt_is_another_payment(self, runway, photo, folder):
        """An item that was put back with other words has its own."""
        books, engine = Books(), engine_of(runway)
        await engine.generate(ASKED, {"photo": photo}, folder, books.job())
        await engine.generate(ASKED.model_copy(update={"prompt": "pan left"}), {"photo": photo}, folder, books.job())
        assert runway.paid == {"slow push": 1, "pan left": 1}
        assert await books.statuses() == ["superseded", "created"]

    async def test_refused_for_now_is_asked_again_a_little(self, runway, photo, folder):
        """A rate limit passes, a daily cap does not: the task goes to somebody else, and nothing was paid."""
        books, engine = Books(), engine_of(runway)
        runway.faults["create"] += [DAILY_CAP] * 4
        with failing(AccountError, runway, "429 You have reached your daily task limit"):
            await engine.generate(ASKED, {"photo": photo}, folder, books.job())
        assert (runway.asked("create"), await books.statuses()) == (4, [])
        runway.faults["create"] += [DAILY_CAP] * 3
        await engine.generate(ASKED, {"photo": photo}, folder, books.job())
        assert (len(runway.tasks), await books.statuses()) == (1, ["created"])

    @pytest.mark.parametrize("fault", [BAD_GATEWAY, UNAVAILABLE, GATEWAY_TIMEOUT])
    async def test_an_overloaded_runway_was_paid_nothing(self, runway, photo, folder, fault):
        """It refused: asked three times more, then the task is handed back, and nothing is left for a person to do."""
        books, engine = Books(), engine_of(runway)
        runway.faults["create"] += [fault] * 4
        with failing(ProviderUnavailable, runway, str(fault.status)):
            await engine.generate(ASKED, {"photo": photo}, folder, books.job())
        assert (runway.asked("create"), await books.statuses()) == (4, [])
        runway.faults["create"] += [fault] * 3
        await engine.generate(ASKED, {"photo": photo}, folder, books.job())
        assert (len(runway.tasks), await books.statuses()) == (1, ["created"])

    @virtual_time
    async def test_refusals_are_five_seconds_apart(self):
        """As its documents ask; and no intent stays in the books meanwhile, which others would take for lost."""
        records, asked_at = MemoryRecords(), []

        async def refuse(_: httpx.Request) -> httpx.Response:
            asked_at.append(anyio.current_time())
            return httpx.Response(503)

        async def put_photo(_: Order) -> str:
            assert await records.all() == {}
            return "data:image/jpeg;base64,AAAA"

        order = Order(MODELS["gen4_turbo"], 5, "1280:720", "slow push", None, b"", "digest")
        job = Job(None, Ledger(records).purchase("item-1", "worker.1"))
        async with RunwayApi("key", "https://runway.test", transport=httpx.MockTransport(refuse)) as api:
            with pytest.raises(ProviderUnavailable):
                await PaidTask(api, job, order, put_photo, poll_interval_s=5, replays=0).pay()
        gaps_s = [after - before for before, after in itertools.pairwise(asked_at)]
        assert (len(gaps_s), await records.all()) == (3, {})
        assert all(5 <= gap_s < 7 for gap_s in gaps_s)

    async def test_where_nobody_listens_nothing_is_paid(self, runway, photo, folder):
        """No connection, no payment: the task is handed back."""
        with RunwayServer() as gone:
            engine = engine_of(gone)
        books = Books()
        with failing(ProviderUnavailable, runway, "cannot be reached"):
            await engine.generate(ASKED, {"photo": photo}, folder, books.job())
        assert await books.statuses() == []

    async def test_an_order_that_is_never_taken_costs_no_task(self, runway, photo, folder):
        """Nothing was paid when the time ran out: it is Runway's trouble, not the task's."""
        runway.faults["create"] += [UNAVAILABLE] * 4
        books = Books()
        with failing(ProviderUnavailable, runway, "RUNWAY_TIMEOUT"):
            await engine_of(runway, timeout_s=0.2, poll_interval_s=30).generate(
                ASKED, {"photo": photo}, folder, books.job()
            )
        assert await books.statuses() == []

    @pytest.mark.parametrize(
        "fault, kind, said",
        [
            (NO_CREDITS, AccountError, "add credits"),
            (Fault(402), AccountError, "add credits"),
            (Fault(401, b'{"error": "Unauthorized"}'), AccountError, "RUNWAYML_API_SECRET"),
            (Fault(403), AccountError, "RUNWAYML_API_SECRET"),
            (Fault(404, b"<html>"), AccountError, "I2V_RUNWAY_URL"),
            (Fault(308, headers=(("Location", "https://elsewhere.test/"),)), AccountError, "I2V_RUNWAY_URL"),
            (Fault(400, b'{"error": "Validation of body failed", "issues": [{"path": ["ratio"], "message": "no"}]}'),
             InvalidRequest, "400 Validation of body failed; ratio: no"),
            (Fault(413), InvalidRequest, "413"),
        ],
    )  # fmt: skip
    async def test_a_refusal_is_no_payment(self, runway, photo, folder, *, fault, kind, said):
        """What is wrong with the account is not the task's fault."""
        books = Books()
        runway.faults["create"].append(fault)
        with failing(kind, runway, said):
            await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())
        assert (await books.statuses(), runway.asked("create")) == ([], 1)

    async def test_a_wrong_key(self, runway, photo, folder):
        """Named by its setting, never shown."""
        with failing(AccountError, runway, "RUNWAYML_API_SECRET") as caught:
            await engine_of(runway, key="key_wrong").generate(ASKED, {"photo": photo}, folder, Job())
        assert "key_wrong" not in str(caught.value)

    async def test_the_day_has_a_limit(self, runway, photo, folder):
        """Found in the books before anything is ordered."""
        books = Books(budget_usd=0.30)
        await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())
        other = ASKED.model_copy(update={"prompt": "another"})
        with failing(BudgetSpent, runway, "I2V_RUNWAY_BUDGET"):
            await engine_of(runway).generate(other, {"photo": photo}, folder, books.job())
        assert len(runway.tasks) == 1

    async def test_a_lease_that_ended_meanwhile_pays_nothing(self, runway, photo, folder):
        """A process that was paused finds out by its own clock, right before the order."""
        books = Books()

        def check() -> None:
            raise LeaseLost("it could not be renewed in time", confirmed=False)

        with pytest.raises(LeaseLost):
            await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job(check=check))
        assert (runway.tasks, await books.statuses()) == ([], [])

    async def test_without_books_nothing_is_paid(self, runway, photo, folder):
        """An intent that cannot be written down is none."""
        books = Books(BrokenRecords({"add"}))
        with failing(RecordsUnavailable, runway):
            await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())
        assert runway.requests == []

    async def test_books_that_break_after_the_payment(self, runway, photo, folder):
        """The process still knows what it paid for, and says so."""
        books = Books(BrokenRecords({"put"}))
        with capture_logs() as logs:
            video = await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())
        assert video.external_ids == {"runway_task_id": runway.tasks[0].id}
        told = [line["runway_task_id"] for line in logs if line["event"] == "runway_task_unrecorded"]
        assert set(told) == {runway.tasks[0].id}

    async def test_a_creation_is_shorter_than_others_wait_for_it(self):
        """Or two would pay."""
        longest_s = runway_paid.CREATION_LIMIT_S + runway_paid.RECORD_LIMIT_S
        assert longest_s < ledgers.CREATION_S


class TestWaiting:
    """Between the order and its end."""

    @pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
    async def test_trouble_on_the_way_passes(self, runway, photo, folder):
        """None of it says anything of the task."""
        faults = [UNAVAILABLE, DROPPED, MALFORMED, DAILY_CAP, unknown_status(), NOT_FOUND, BAD_GATEWAY, NOT_FOUND]
        runway.faults["poll"] += [*faults, NOT_FOUND, unknown_status("PAUSED"), Fault(200, b"[]")]
        await engine_of(runway).generate(ASKED, {"photo": photo}, folder, Job())
        assert (len(runway.tasks), runway.asked("delete")) == (1, 0)

    async def test_more_than_the_tier_allows_waits_there(self, runway, photo, tmp_path):
        """THROTTLED is pending, and every clip is made."""
        runway.concurrency = 1
        engine = engine_of(runway)

        async def generate(number: int) -> None:
            folder = tmp_path / str(number)
            folder.mkdir()
            await engine.generate(ASKED.model_copy(update={"prompt": str(number)}), {"photo": photo}, folder, Job())

        async with anyio.create_task_group() as tasks:
            for number in range(3):
                tasks.start_soon(generate, number)
        assert runway.paid == {"0": 1, "1": 1, "2": 1}

    async def test_a_task_that_is_gone_is_paid_for_again(self, runway, photo, folder):
        """No clip will come of it. That it was paid for stays in the books."""
        books, engine = Books(), engine_of(runway)
        runway.faults["poll"] += [NOT_FOUND] * 3
        with failing(EngineFailed, runway, "is gone"):
            await engine.generate(ASKED, {"photo": photo}, folder, books.job())
        [payment] = await books.ledger.payments()
        assert (payment.status, payment.failures, payment.cost_usd) == ("failed", ("GONE",), pytest.approx(0.25))
        await engine.generate(ASKED, {"photo": photo}, folder, books.job())
        assert await books.statuses() == ["failed", "created"]

    async def test_a_key_that_stops_working(self, runway, photo, folder):
        """The payment stays open: with a working key it goes on."""
        books = Books()
        runway.faults["poll"].append(Fault(401))
        with failing(AccountError, runway):
            await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())
        assert await books.statuses() == ["created"]
        await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())
        assert len(runway.tasks) == 1

    @pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
    async def test_no_end_within_the_time(self, runway, photo, folder):
        """It is told to stop, and fails without another try."""
        runway.endings.append("HANGS")
        books = Books()
        with failing(EngineHung, runway, "RUNWAY_TIMEOUT"):
            await engine_of(runway, timeout_s=0.3).generate(ASKED, {"photo": photo}, folder, books.job())
        assert (runway.tasks[0].status, runway.tasks[0].deleted) == ("CANCELLED", True)
        assert await books.statuses() == ["cancelled"]
        assert not EngineHung.retryable

    async def test_waiting_for_a_slot_counts(self, runway, photo, folder):
        """THROTTLED for ever is no end, either; and money comes back for what never began."""
        runway.concurrency = 0
        with failing(EngineHung, runway):
            await engine_of(runway, timeout_s=0.3).generate(ASKED, {"photo": photo}, folder, Job())
        assert runway.tasks[0].refunded

    @pytest.mark.parametrize("fault", [UNAVAILABLE, DAILY_CAP, DROPPED])
    async def test_an_outage_costs_no_clip(self, runway, photo, folder, fault):
        """Nobody told of the task until the time ran out: it is not stopped, and the next lease fetches it."""
        runway.faults["poll"] += [fault] * 10_000
        books = Books()
        with failing(ProviderUnavailable, runway, "which is paid for"):
            await engine_of(runway, timeout_s=0.3).generate(ASKED, {"photo": photo}, folder, books.job())
        assert (runway.asked("delete"), await books.statuses()) == (0, ["created"])
        runway.faults["poll"].clear()
        await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())
        assert len(runway.tasks) == 1

    async def test_a_refusal_to_tell_is_no_end_of_the_task(self, runway, photo, folder):
        """Only `not found` says that a task is gone: of anything else it would be paid for a second time."""
        runway.faults["poll"] += [Fault(400), Fault(405), Fault(308), Fault(422)]
        await engine_of(runway).generate(ASKED, {"photo": photo}, folder, Books().job())
        assert len(runway.tasks) == 1

    async def test_a_task_that_could_not_be_stopped_stays_open(self, runway, photo, folder):
        """Whoever comes next goes on with it instead of paying again."""
        runway.endings.append("HANGS")
        runway.faults["delete"].append(UNAVAILABLE)
        books = Books()
        with failing(EngineHung, runway):
            await engine_of(runway, timeout_s=0.3).generate(ASKED, {"photo": photo}, folder, books.job())
        assert await books.statuses() == ["created"]
        runway.finish(runway.tasks[0].id)
        runway.tasks[0].ending, runway.tasks[0].status = "SUCCEEDED", "SUCCEEDED"
        await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())
        assert len(runway.tasks) == 1


class TestStopping:
    """Who wants the video decides what becomes of the task."""

    async def stopped(self, runway, photo, folder, job, reason) -> None:
        """Runs until Runway has been asked twice, then ends the job as a keeper does."""
        runway.hold()
        with anyio.move_on_after(30) as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(engine_of(runway).generate, ASKED, {"photo": photo}, folder, job)
                await until(lambda: runway.asked("poll") > 1)
                if reason is not None:
                    job.cancel(reason)
                scope.cancel()
        runway.release()

    @pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
    @pytest.mark.parametrize(
        "reason, stopped",
        [
            (CancelRequested("a person"), True),
            (LeaseLost("404"), True),
            (LeaseLost("not renewed in time", confirmed=False), False),
            (None, False),
        ],
    )
    async def test_what_nobody_wants_is_stopped(self, runway, photo, folder, reason, stopped):
        """A person's word, or the queue's. A worker that merely stops leaves it to the next."""
        books = Books()
        await self.stopped(runway, photo, folder, books.job(), reason)
        assert runway.tasks[0].deleted is stopped
        assert await books.statuses() == ["cancelled" if stopped else "created"]
        assert list(folder.iterdir()) == []

    async def test_without_books_it_is_always_stopped(self, runway, photo, folder):
        """Nobody could ever find it again."""
        await self.stopped(runway, photo, folder, Job(), None)
        assert runway.tasks[0].refunded

    async def test_what_somebody_else_follows_is_left_alone(self, runway, photo, folder):
        """The successor has taken it over before the loser heard of it."""
        books = Books()
        runway.hold()
        loser = books.job()
        with anyio.move_on_after(30) as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(engine_of(runway).generate, ASKED, {"photo": photo}, folder, loser)
                await until(lambda: runway.asked("poll") > 1)
                [payment] = await books.ledger.payments()
                await books.ledger.purchase("item-1", "successor").resume(payment.request)
                loser.cancel(LeaseLost("404"))
                scope.cancel()
        assert (runway.asked("delete"), await books.statuses()) == (0, ["created"])

    async def test_what_has_succeeded_is_kept(self, runway, photo, folder):
        """Its money is spent: if the person changes their mind, the clip is there."""
        books, heard = Books(), []
        job = books.job()
        job._tracker = StageTracker(plan(RunwayEngine.stages), heard.append)

        def cancel(progress) -> None:
            if progress.stage == "fetch":
                job.cancel(CancelRequested("a person"))
                scope.cancel()

        job._tracker._sink = cancel
        with anyio.CancelScope() as scope:
            await engine_of(runway).generate(ASKED, {"photo": photo}, folder, job)
        assert (runway.asked("delete"), await books.statuses()) == (0, ["created"])
        await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())
        assert len(runway.tasks) == 1


class TestFailures:
    """A task that ended without a clip."""

    @pytest.mark.parametrize(
        "code, kind",
        [
            ("SAFETY.INPUT.TEXT", ContentRefused),
            ("INPUT_PREPROCESSING.SAFETY.TEXT", ContentRefused),
            ("ASSET.INVALID", InvalidRequest),
            ("THIRD_PARTY.INPUT_VALIDATION.IMAGE", InvalidRequest),
            ("INTERNAL", EngineFailed),
            ("INPUT_PREPROCESSING.INTERNAL", EngineFailed),
            ("THIRD_PARTY.UNAVAILABLE", EngineFailed),
            ("UNKNOWN", EngineFailed),
            ("UNSAFETY.ASSET.INVALIDATED", EngineFailed),
        ],
    )
    async def test_codes_are_read_by_segment(self, runway, photo, folder, code, kind):
        """And the books say what it cost: Runway keeps the money only for what it moderated."""
        books = Books()
        runway.endings.append(code)
        with failing(kind, runway):
            await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())
        [payment] = await books.ledger.payments()
        assert (payment.status, payment.failures) == ("failed", (code,))
        assert payment.cost_usd == pytest.approx(0.25 if kind is ContentRefused else 0)

    @pytest.mark.parametrize("code", ["SAFETY.OUTPUT.VIDEO", "ASSET.INVALID"])
    async def test_what_was_refused_for_good_is_never_asked_again(self, runway, photo, folder, code):
        """Not by the next worker, not when the item is put back as it was: repeats suspend the account."""
        books = Books()
        runway.endings.append(code)
        for _ in range(3):
            with failing(ContentRefused if "SAFETY" in code else InvalidRequest, runway, code):
                await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())
        assert runway.asked("create") == 1
        await engine_of(runway).generate(
            ASKED.model_copy(update={"prompt": "kinder"}), {"photo": photo}, folder, books.job()
        )

    async def test_bad_output_is_tried_once_more(self, runway, photo, folder):
        """Then it is the photo."""
        books = Books()
        runway.endings += ["INTERNAL.BAD_OUTPUT.CODE01"] * 2
        with failing(EngineFailed, runway):
            await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())
        with failing(InvalidRequest, runway, "twice"):
            await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())

    async def test_cancelled_over_there(self, runway, photo, folder):
        """By somebody at Runway's own page."""
        books = Books()
        runway.endings.append("CANCELLED")
        with failing(EngineFailed, runway, "cancelled there"):
            await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())
        assert await books.statuses() == ["cancelled"]


class TestClip:
    """What Runway made, on its way to a file."""

    async def test_an_address_that_has_expired_is_asked_for_again(self, runway, photo, folder):
        """Addresses of clips do not live long."""
        expired = Fault(403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        runway.faults["output"] += [expired, Fault(403, b"<Error><Code>AccessDenied</Code></Error>")]
        await engine_of(runway).generate(ASKED, {"photo": photo}, folder, Job())
        assert runway.asked("output") == 3

    async def test_a_clip_that_is_gone(self, runway, photo, folder, monkeypatch):
        """However often it is asked for: another may be paid for."""
        books = Books()
        runway.faults["output"] += [NOT_FOUND] * 3
        asked, pause = [], PaidTask.pause

        async def pausing(paid):
            asked.append(runway.asked("output"))
            await pause(paid)

        monkeypatch.setattr(PaidTask, "pause", pausing)
        with failing(EngineFailed, runway, "its clip is gone"):
            await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())
        assert await books.statuses() == ["failed"]
        assert {1, 2} <= set(asked)  # it had time to come

    @pytest.mark.parametrize(
        "faults, kind",
        [
            ([UNAVAILABLE] * 3, ProviderUnavailable),
            ([DROPPED] * 3, ProviderUnavailable),
            ([Fault(403)] * 3, StorageRefused),
        ],
    )
    async def test_a_download_that_fails_pays_nothing_again(self, runway, photo, folder, faults, kind):
        """The next try fetches the same clip."""
        books = Books()
        runway.faults["output"] += faults
        with failing(kind, runway):
            await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())
        assert list(folder.iterdir()) == []
        await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())
        assert (len(runway.tasks), await books.statuses()) == (1, ["created"])

    async def test_a_clip_is_asked_for_again(self, runway, photo, folder):
        """One failure on the way is no outage."""
        runway.faults["output"] += [UNAVAILABLE, DROPPED]
        await engine_of(runway).generate(ASKED, {"photo": photo}, folder, Job())
        assert (runway.asked("output"), len(runway.tasks)) == (3, 1)

    async def test_fetching_has_a_time_of_its_own(self, runway, photo, folder):
        """RUNWAY_TIMEOUT is for what can still be cancelled: a clip that was made in time is not lost on its way."""
        runway.faults["output"].append(SLOW)
        async with anyio.create_task_group() as tasks:

            async def release() -> None:
                await until(lambda: runway.asked("output"))
                await anyio.sleep(0.6)
                runway.release_hanging()

            tasks.start_soon(release)
            await engine_of(runway, timeout_s=0.5).generate(ASKED, {"photo": photo}, folder, Job())
        assert len(runway.tasks) == 1

    async def test_an_address_inside_is_not_visited(self, runway, photo, folder):
        """Unless it is the operator's own."""
        with failing(AddressRefused, runway):
            await engine_of(runway, trusted_origins=[]).generate(ASKED, {"photo": photo}, folder, Job())
        assert runway.asked("output") == 0

    async def test_what_is_no_video(self, runway, photo, folder):
        """Is not tried, and paid for, again; it stays there for a look."""
        runway.clip = b"\x00\x00\x00\x18ftypmp42 and then nothing that plays"
        books = Books()
        with failing(MediaError, runway, "not a video"):
            await engine_of(runway).generate(ASKED, {"photo": photo}, folder, books.job())
        assert (await books.statuses(), list(folder.iterdir())) == (["created"], [])

    @pytest.mark.parametrize(
        "options",
        [
            ("-c", "copy"),  # the index at the end
            ("-c:v", "mpeg4", "-q:v", "5", "-movflags", "+faststart"),
            ("-c:v", "libx264", "-pix_fmt", "yuv444p", "-movflags", "+faststart"),
        ],
    )
    async def test_a_clip_of_another_kind_is_made_to_play_everywhere(self, runway, photo, tmp_path, folder, options):
        """H.264, yuv420p, index at the front; as many frames as there were."""
        runway.clip = encoded(tmp_path, *options)
        video = await engine_of(runway).generate(ASKED, {"photo": photo}, folder, Job())
        info = probe(video.path)
        assert (info.codec, info.pix_fmt, info.faststart, info.frames) == ("h264", "yuv420p", True, 120)

    async def test_a_clip_as_it_should_be_stays_as_it_is(self, runway, photo, tmp_path, folder):
        """Byte for byte, sound included."""
        runway.clip = encoded(tmp_path, "-c", "copy", "-movflags", "+faststart")
        video = await engine_of(runway).generate(ASKED, {"photo": photo}, folder, Job())
        assert video.path.read_bytes() == runway.clip

    async def test_a_clip_of_variable_rate_is_cut(self, runway, photo, folder):
        """As a provider made it: 19 frames lie in its first second, whatever their mean rate says."""
        runway.clip = (CASES / "vfr.mp4").read_bytes()
        request = ASKED.model_copy(update={"duration_s": 1.0})
        video = await engine_of(runway).generate(request, {"photo": photo}, folder, Job())
        assert (video.frames, video.as_it_came) == (19, None)
        assert video.duration_s == pytest.approx(1, abs=0.05)

    async def test_a_clip_that_cannot_be_encoded_is_delivered_as_it_came(self, runway, photo, folder, fake_ffmpeg):
        """Its money is spent: uncut it is worth more than an error. The log and the video say so."""
        runway.clip = (CASES / "vfr.mp4").read_bytes()
        request = ASKED.model_copy(update={"duration_s": 1.0})
        fake_ffmpeg("echo '[libx264 @ 0x1] broken' >&2; exit 1", but_for="framecrc")  # it can be probed
        with capture_logs() as logs:
            video = await engine_of(runway).generate(request, {"photo": photo}, folder, Job())
        assert video.path.read_bytes() == runway.clip
        assert (video.frames, video.as_it_came) == (39, "ffmpeg ended with 1: broken")
        assert [line["wanted_s"] for line in logs if line["event"] == "clip_as_it_came"] == [1.0]
        assert list(folder.iterdir()) == [video.path]

    async def test_sound_is_cut_with_the_picture(self, runway, photo, tmp_path, folder):
        """Veo's clips have some."""
        runway.clip = encoded(tmp_path, "-c", "copy", sound=True)
        request = ASKED.model_copy(update={"duration_s": 3.0})
        request = request.model_copy(update={"provider": "veo3.1"})
        video = await engine_of(runway).generate(request, {"photo": photo}, folder, Job())
        assert video.frames == 72
        assert sound_s(video.path) == pytest.approx(3.0, abs=0.1)

    async def test_a_full_disk(self, runway, photo, tmp_path):
        """Is this machine's trouble: the payment stays open for another."""
        books = Books()
        with small_disk(tmp_path / "disk", "4k") as disk:
            with failing(DiskFull, runway):
                await engine_of(runway).generate(ASKED, {"photo": photo}, disk, books.job())
            assert (await books.statuses(), list(disk.iterdir())) == (["created"], [])


class TestRunner:
    """The engine where it works: under a lease, with the books of its machine."""

    def item(self) -> MemoryStore:
        """A queue with one item, whose clock stands still."""
        self.now = 0.0
        store = MemoryStore(clock=lambda: self.now)
        buffer = io.BytesIO()
        Image.new("RGB", (320, 180), "teal").save(buffer, "JPEG")
        store.add(buffer.getvalue(), id="item-1", prompt="slow push")
        return store

    async def test_an_accepted_video_ends_the_payment(self, runway, tmp_path):
        """Until then, whoever gets the task next goes on with what was paid for."""
        store, books = self.item(), Books()
        queue = MemoryQueue(store)
        runner = Runner(queue, engine_of(runway), temp_dir=tmp_path, ledger=books.ledger)
        outcome = await runner.run(await queue.lease())
        assert (outcome.status, outcome.video.cost_usd) == ("completed", pytest.approx(0.25))
        assert await books.statuses() == ["delivered"]
        assert store.get("item-1").external_ids == {"runway_task_id": runway.tasks[0].id}

    async def test_a_stopped_worker_and_its_successor_pay_once(self, runway, tmp_path):
        """The lease is handed back, the task runs on at Runway."""
        store, books = self.item(), Books()
        queue = MemoryQueue(store)
        runway.hold()
        first = Runner(queue, engine_of(runway), temp_dir=tmp_path, ledger=books.ledger)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first.run, await queue.lease())
            await until(lambda: runway.asked("poll") > 1)
            tasks.cancel_scope.cancel()
        runway.release()
        self.now += 1.1  # a lease that is handed back ends after a second
        second = Runner(queue, engine_of(runway), temp_dir=tmp_path, ledger=books.ledger)
        outcome = await second.run(await queue.lease())
        assert (outcome.status, runway.paid) == ("completed", {"slow push": 1})
        assert await books.statuses() == ["delivered"]

    async def test_an_outage_hands_the_task_back(self, runway, tmp_path):
        """At once: the engine has asked again already. The worker is told to wait, and the next one pays once."""
        store, books = self.item(), Books()
        queue = MemoryQueue(store)
        runway.faults["create"] += [BAD_GATEWAY] * 4
        runner = Runner(queue, engine_of(runway), temp_dir=tmp_path, ledger=books.ledger)
        outcome = await runner.run(await queue.lease())
        assert (outcome.status, store.get("item-1").retry_count) == ("released", 0)
        assert (runway.asked("create"), await books.statuses()) == (4, [])
        self.now += 1.1  # a lease that is handed back ends after a second
        outcome = await runner.run(await queue.lease())
        assert (outcome.status, runway.paid) == ("completed", {"slow push": 1})

    async def test_failures_that_may_pass_are_tried_again(self, runway, tmp_path):
        """Each try is a payment of its own, since Runway gives the money back for what failed."""
        store, books = self.item(), Books()
        queue = MemoryQueue(store)
        runway.endings += ["INTERNAL", "THIRD_PARTY.UNAVAILABLE"]
        policy = Policy(retry_wait_s=0.01)
        runner = Runner(queue, engine_of(runway), temp_dir=tmp_path, ledger=books.ledger, policy=policy)
        outcome = await runner.run(await queue.lease())
        assert (outcome.status, runway.paid) == ("completed", {"slow push": 1})
        assert await books.statuses() == ["failed", "failed", "delivered"]
        assert await books.ledger.spent_usd() == pytest.approx(0.25)

    @pytest.mark.parametrize(
        "prepare, told, at_fault",
        [
            (lambda it: it.endings.append("SAFETY.INPUT.IMAGE"), "moderation", False),
            (lambda it: it.faults["create"].append(REPLY_LOST), "i2v payments --forget item-1", True),
        ],
    )
    async def test_what_a_person_has_to_see_is_reported(self, runway, tmp_path, prepare, told, at_fault):
        """Once, to the queue, without another try."""
        store, books = self.item(), Books()
        queue = MemoryQueue(store)
        prepare(runway)
        outcome = await Runner(queue, engine_of(runway), temp_dir=tmp_path, ledger=books.ledger).run(
            await queue.lease()
        )
        assert (outcome.status, outcome.machine_at_fault) == ("failed", at_fault)
        assert told in store.get("item-1").error_message
        assert runway.asked("create") == 1


class BrokenRecords(MemoryRecords):
    """Records of which some methods fail, having written or not."""

    def __init__(self, broken: set[str]) -> None:
        super().__init__()
        self.broken = broken

    async def add(self, key: str, value: str) -> bool:
        """See Records."""
        if "add" in self.broken:
            raise RecordsUnavailable("the disk is gone")
        return await super().add(key, value)

    async def put(self, key: str, value: str) -> None:
        """See Records."""
        if "put" in self.broken:
            raise RecordsUnavailable("the disk is gone")
        await super().put(key, value)


async def until(condition) -> None:
    """Lets everything else run until something is true."""
    with anyio.fail_after(20):
        while not condition():
            await anyio.sleep(0.005)


def encoded(folder: Path, *options: str, sound: bool = False) -> bytes:
    """A clip of five seconds in another encoding."""
    plain, path = folder / "plain.mp4", folder / "encoded.mp4"
    with VideoWriter(plain, width=64, height=48, fps=24) as writer:
        for number in range(120):
            writer.write(np.full((48, 64, 3), number, np.uint8))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", plain]
    if sound:
        command += ["-f", "lavfi", "-i", "sine=duration=5", "-c:a", "aac"]
    subprocess.run(
        [*command, *options, "-y", path] if not sound else [*command, "-c:v", "copy", "-y", path], check=True
    )
    return path.read_bytes()


def sound_s(path: Path) -> float:
    """Seconds of sound in a file."""
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-i",
        path,
        "-map",
        "0:a:0",
        "-f",
        "s16le",
        "-ar",
        "8000",
    ]
    return len(subprocess.run([*command, "-ac", "1", "-"], capture_output=True, check=True).stdout) / 16_000


def test_every_model_is_one():
    """Shortest length first, sizes of even sides."""
    for name, model in MODELS.items():
        assert isinstance(model, Model)
        assert (model.name, list(model.seconds)) == (name, sorted(model.seconds))
        assert all(int(side) % 2 == 0 for ratio in model.ratios for side in ratio.split(":"))
