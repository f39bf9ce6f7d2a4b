"""One video without a queue, whoever asks for it."""

import anyio
import pytest

from inference.engines.base import Job
from inference.engines.turns import EngineTurns
from inference.errors import EngineFailed, InvalidPhoto, UrlExpired
from inference.leasing.direct import generated, name_of
from inference.leasing.retry import Policy
from inference.payments.ledger import Ledger
from inference.payments.records import MemoryRecords
from inference.progress.stages import StageTracker
from inference.task import GenerationRequest
from tests.leasing.test_runner import SleepyEngine

pytestmark = pytest.mark.anyio
REQUEST = GenerationRequest(duration_s=5)


@pytest.fixture
def photo(tmp_path, photo_bytes):
    """One that is one."""
    path = tmp_path / "photo"
    path.write_bytes(photo_bytes)
    return path


async def test_what_is_no_photo_never_gets_a_turn(tmp_path):
    """It is told before the engine is waited for."""
    engine = SleepyEngine(seconds=0)
    (tmp_path / "photo").write_bytes(b"hello")
    with pytest.raises(InvalidPhoto):
        async with generated(EngineTurns(engine), REQUEST, {"photo": tmp_path / "photo"}, tmp_path, Job()):
            pass
    assert engine.runs == 0


async def test_tries_are_the_callers_to_choose(tmp_path, photo):
    """One for a person who waits; as many as a lease has where nobody does."""
    engine = SleepyEngine(seconds=0, errors=[EngineFailed("no")] * 3)
    with pytest.raises(EngineFailed):
        async with generated(EngineTurns(engine), REQUEST, {"photo": photo}, tmp_path, Job()):
            pass
    assert engine.runs == 1
    with anyio.fail_after(30):
        patient = Policy(attempts=3, retry_wait_s=0)
        async with generated(EngineTurns(engine), REQUEST, {"photo": photo}, tmp_path, Job(), policy=patient) as video:
            assert video.frames == 25
    assert engine.runs == 4


async def test_what_ran_out_while_it_waited_is_not_generated_for(tmp_path, photo):
    """The check is asked when the turn has come, and not before."""
    turns, engine_began = EngineTurns(engine := SleepyEngine(seconds=0)), []
    tracker = StageTracker(engine.stages, lambda progress: engine_began.append(progress.stage))

    def check():
        assert engine_began == ["wait"]
        raise UrlExpired("it ended")

    with pytest.raises(UrlExpired):
        async with generated(turns, REQUEST, {"photo": photo}, tmp_path, Job(tracker), check=check):
            pass
    assert engine.runs == 0


async def test_a_payment_is_delivered_when_the_video_was_taken_away(tmp_path, photo):
    """Until then the same request goes on with what was paid for."""
    ledger = Ledger(MemoryRecords())

    async def pay():
        purchase = ledger.purchase("x", "me")
        if await purchase.resume("r") is None:
            assert await purchase.intend("r", model="m", cost_usd=0.25)
            await purchase.created("clip-1")
        return purchase

    with pytest.raises(OSError, match="full"):
        async with generated(
            EngineTurns(SleepyEngine(seconds=0)), REQUEST, {"photo": photo}, tmp_path, Job(None, await pay())
        ):
            raise OSError("full")
    assert await ledger.is_paid_for("x")
    async with generated(
        EngineTurns(SleepyEngine(seconds=0)), REQUEST, {"photo": photo}, tmp_path, Job(None, await pay())
    ):
        assert await ledger.is_paid_for("x")
    assert [payment.status for payment in await ledger.payments()] == ["delivered"]


def test_the_same_photo_and_wishes_have_one_name():
    """Anything else has another."""
    name = name_of(REQUEST, b"photo")
    assert name == name_of(GenerationRequest(duration_s=5, seed=None), b"photo")
    assert len({name, name_of(REQUEST, b"other"), name_of(GenerationRequest(duration_s=5, seed=1), b"photo")}) == 3
