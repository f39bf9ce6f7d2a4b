"""The promises of a whole fleet over some seeds. More of them: `python -m tests.simulation.fleet --seeds 1000`."""

import pytest

from tests.simulation import fleet as simulation
from tests.simulation.leases import Broken

SEEDS, CHUNK = 12, 4


@pytest.fixture(autouse=True)
def _quiet():
    simulation.quiet()


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_promises_hold_in_every_fleet(first):
    """Whatever is preempted, killed, refused or lost: each task ends once, money is spent once, and all go home."""
    worlds = [simulation.simulate(seed) for seed in range(first, first + CHUNK)]
    assert "completed" in {item.status for world in worlds for item in world.store.items.values()}
    assert sum(len(world.gpu.history) for world in worlds) > CHUNK  # or nothing has happened


def test_a_seed_replays_exactly():
    """A failing seed is worth something only if it fails again in the same way."""

    def story(seed):
        world = simulation.simulate(seed)
        return [(event.at_s, event.verb, event.item_id, event.accepted, event.status) for event in world.store.log]

    assert story(3) == story(3)


def test_a_clip_that_is_paid_twice_is_noticed():
    """The checks are no decoration."""
    world = next(world for world in map(simulation.simulate, range(SEEDS)) if world.provider.charges)
    charge = next(iter(world.provider.charges.values()))
    charge.ending, charge.stopped = "SUCCEEDED", False
    world.provider.charges["once more"] = charge
    with pytest.raises(Broken, match="paid for 2 times"):
        simulation.check_paid(world)
