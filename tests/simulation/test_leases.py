"""The promises of reliability.md over many seeds. More of them: `python -m tests.simulation.leases --seeds 10000`."""

import pytest

from tests.simulation import leases as simulation

SEEDS, CHUNK = 150, 50


@pytest.fixture(autouse=True)
def _quiet():
    simulation.quiet()


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_promises_hold_in_every_world(first):
    """Whatever is lost, killed, paused or cancelled: every task ends once, fenced, and nobody pays past a lease."""
    worlds = [simulation.simulate(seed) for seed in range(first, first + CHUNK)]
    ends = {item.status for world in worlds for item in world.store.items.values()}
    assert ends == {"completed", "failed", "cancelled"}  # otherwise the storms are too mild or too wild to show much


def test_a_seed_replays_exactly():
    """A failing seed is worth something only if it fails again in the same way."""

    def story(seed):
        world = simulation.simulate(seed)
        return [(event.at_s, event.verb, event.item_id, event.accepted, event.status) for event in world.store.log]

    for seed in (3, 8, 105):
        assert story(seed) == story(seed)


def test_a_broken_promise_is_noticed():
    """The checks are no decoration: a log in which an ended task is written to again is refused."""
    world = simulation.simulate(1)
    item = next(item for item in world.store.items.values() if item.status == "completed")
    world.store._clock = lambda: 1e9
    world.store._write("heartbeat", item, "somebody.else")
    with pytest.raises(simulation.Broken, match="was accepted"):
        simulation.check(world)
