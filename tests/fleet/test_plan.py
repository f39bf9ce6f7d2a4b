"""A plan, from numbers alone."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.build.engines import price_usd
from inference.fleet.plan import FIRST_CLIP_S, Fleet, Plan, Pool, Rules, choices, plan
from inference.fleet.tick_state import TickState
from inference.payments.ledger import Payment, paid_in_parts
from inference.providers import is_known, provider_of
from inference.settings import Settings
from inference.task import Segment, Task
from tests.fleet.test_dispatch import CLIP_USD, HINTS, task

pools = st.builds(
    Pool,
    slots=st.integers(0, 20),
    held=st.integers(0, 30),
    engines=st.integers(1, 10),
    clip_s=st.floats(0.5, 600),
    failing=st.sampled_from([None, None, "no weights"]),
)
fleets = st.builds(
    Fleet,
    gpu=pools,
    runway=st.none() | pools,
    waiting=st.none() | st.integers(0, 500),
    undry_s=st.floats(0, 10_000),
    spent_usd=st.floats(0, 20),
    paid_for=st.integers(0, 2),
)
rules = st.builds(
    Rules,
    overflow_after_s=st.floats(0, 2000),
    overflow_wan_local=st.booleans(),
    budget_usd=st.floats(0, 20),
)


@given(fleets, rules)
def test_a_plan_leases_only_what_can_start(fleet, rules):
    """Never more than the free slots of each pool, nothing for one that fails or is not there."""
    it = plan(fleet, rules)
    assert it.gpu == (0 if fleet.gpu.failing else max(0, fleet.gpu.slots - fleet.gpu.held))
    assert it.runway <= (fleet.runway.free if fleet.runway else 0)
    assert it.overflow <= it.runway


@given(fleets, rules)
def test_a_plan_stays_within_the_budget(fleet, rules):
    """What may be spent is what is left of the day; with nothing left only what is paid for already may start."""
    it = plan(fleet, rules)
    assert it.budget_usd <= max(0.0, rules.budget_usd - fleet.spent_usd)
    if fleet.spent_usd >= rules.budget_usd:
        assert it.overflow == 0
        assert it.runway == 0 or fleet.paid_for


@given(fleets, rules)
def test_a_plan_starves_neither_pool(fleet, rules):
    """What one pool may take does not depend on how full the other is, overflow aside."""
    it = plan(fleet, rules)
    emptied = plan(fleet.model_copy(update={"gpu": fleet.gpu.model_copy(update={"held": 0})}), rules)
    assert emptied.runway == it.runway
    assert plan(fleet.model_copy(update={"runway": None}), rules).gpu == it.gpu


@given(fleets.filter(lambda fleet: fleet.waiting is not None and fleet.runway and not fleet.gpu.failing), rules)
def test_only_the_excess_overflows(fleet, rules):
    """Without what overflows the rest waits for the limit at most, and one task less would be too few."""
    it = plan(fleet, rules)
    gpu = fleet.gpu
    assert it.wait_s == pytest.approx((fleet.waiting + gpu.held) * gpu.clip_s / gpu.engines)
    stay = fleet.waiting + gpu.held - it.overflow
    slack = 1e-6 * (1 + it.wait_s)
    if it.overflow:
        assert (stay + 1) * gpu.clip_s / gpu.engines > rules.overflow_after_s - slack
    if it.overflow < it.runway and rules.budget_usd > fleet.spent_usd:
        assert stay * gpu.clip_s / gpu.engines <= rules.overflow_after_s + slack


@given(fleets.filter(lambda fleet: fleet.waiting is None and fleet.runway and not fleet.gpu.failing), rules)
def test_a_queue_that_cannot_count_goes_by_the_time_since_it_was_empty(fleet, rules):
    """And only while the GPU pool is full: with a free slot nobody waits."""
    it = plan(fleet, rules)
    too_long = not fleet.gpu.free and fleet.undry_s > rules.overflow_after_s
    assert it.overflow == (it.runway if too_long and rules.budget_usd > fleet.spent_usd else 0)


@given(fleets, rules)
def test_a_failing_gpu_pool_overflows_all_it_may(fleet, rules):
    """No wait is expected, for nobody knows how long it fails."""
    failing = fleet.gpu.model_copy(update={"failing": "no weights"})
    it = plan(fleet.model_copy(update={"gpu": failing}), rules)
    assert (it.gpu, it.wait_s) == (0, None)
    assert it.overflow == (it.runway if rules.budget_usd > fleet.spent_usd else 0)
    assert "no weights" in it.why


@pytest.mark.parametrize("hint", HINTS)
@pytest.mark.parametrize("has_runway", [True, False])
@pytest.mark.parametrize("allowed", [True, False])
def test_the_table_of_hints(hint, has_runway, allowed):
    """`wan_local` leaves the GPU pool only where that is allowed; Runway's own go straight there, if there is a key."""
    found = choices(task(hint), Rules(overflow_wan_local=allowed), has_runway=has_runway)
    if not has_runway:
        assert found == ("gpu",)
    elif provider_of(hint).is_paid:
        assert found == ("runway",)
    elif not is_known(hint):
        assert found == ("gpu",)  # nobody is known to have agreed to pay
    else:
        assert found == (("gpu", "runway") if hint is None or allowed else ("gpu",))


def test_what_a_task_costs_is_known_before_it_is_sent():
    """By the model of its hint, or the default one; nothing where Runway makes no such clip."""
    plain = Settings.isolated()
    assert price_usd(plain, task(None)) == CLIP_USD
    assert price_usd(plain, task("veo3.1")) == pytest.approx(1.20)  # it makes 6 s, not 5
    assert price_usd(Settings.isolated(runway_audio=True), task("veo3.1")) == pytest.approx(2.40)
    assert price_usd(plain, task(None, duration_s=30)) is None
    assert price_usd(plain, task("comfyui")) is None
    assert price_usd(plain, task(None).model_copy(update={"prompt": "x" * 1001})) is None  # a GPU takes it
    longer = Settings.isolated(runway_duration_s=10)  # for tasks that name no length
    assert price_usd(longer, task(None).model_copy(update={"names_duration": False})) == pytest.approx(0.50)
    assert price_usd(longer, task(None)) == CLIP_USD


def film(count: int, provider: str | None = None) -> Task:
    """A task of so many segments of five seconds."""
    segments = tuple(Segment(photo="photo", prompt=f"{number}", duration_s=5) for number in range(count))
    return task(provider).model_copy(update={"segments": segments})


def test_a_film_costs_what_its_segments_cost():
    """And cannot be made at Runway where one of them cannot."""
    plain = Settings.isolated()
    assert price_usd(plain, film(4)) == pytest.approx(4 * CLIP_USD)
    long = Segment(photo="photo", duration_s=30)
    assert price_usd(plain, film(2).model_copy(update={"segments": (*film(2).segments, long)})) is None


def test_a_film_of_which_segments_were_paid_for_goes_on_there():
    """Without overflow, for the price of what is missing; its finished clips are of no use to another engine."""
    payment = Payment(item_id="item.k", part_of="item", request="r", model="m", holder="h", at=0, cost_usd=CLIP_USD)
    payments = [payment.model_copy(update={"status": status}) for status in ("delivered", "created", "failed")]
    begun_usd = paid_in_parts([*payments, payment.model_copy(update={"part_of": None, "status": "created"})])
    assert begun_usd == {"item": 2 * CLIP_USD}
    told = {"began_at": 0.0, "may_pay": True, "paid_for": frozenset(), "troubles": []}
    with_room = Plan(gpu=1, runway=1, overflow=0, budget_usd=CLIP_USD, why="")
    price = partial(price_usd, Settings.isolated())
    fresh = TickState(with_room, Rules(), price, begun_usd={}, **told)
    begun = TickState(with_room, Rules(), price, begun_usd=begun_usd, **told)
    assert (fresh.choose(film(3)), fresh.price_usd(film(3))) == ("gpu", pytest.approx(3 * CLIP_USD))
    assert (begun.choose(film(3)), begun.price_usd(film(3))) == ("runway", pytest.approx(CLIP_USD))


def test_the_first_guess_is_slow():
    """A fleet that never made a clip overflows early, not late."""
    assert Pool(slots=1, held=0, engines=1).clip_s == FIRST_CLIP_S >= 60
