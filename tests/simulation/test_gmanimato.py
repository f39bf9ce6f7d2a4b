"""What GmAnimato's queue promises, over many seeds. More: `python -m tests.simulation.gmanimato --seeds 10000`."""

import pytest

from tests.simulation import gmanimato as simulation

SEEDS, CHUNK = 20, 20


@pytest.fixture(autouse=True)
def _quiet():
    simulation.quiet()


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_promises_hold_in_every_world(first):
    """Whatever is lost, late, killed or stopped: one end for a job, nothing after it, and none forgotten."""
    worlds = [simulation.simulate(seed) for seed in range(first, first + CHUNK)]
    ends = {job.status for world in worlds for job in world.app.jobs.values()}
    assert {"completed", "failed"} <= ends  # otherwise the storms are too wild to show much


def test_a_seed_replays_exactly():
    """A failing seed is worth something only if it fails again in the same way."""

    def story(seed):
        asked = simulation.simulate(seed).app.asked
        return [(call.at_s, call.call, call.video_id, call.status, call.body) for call in asked]

    for seed in (3, 8):
        assert story(seed) == story(seed)


@pytest.mark.parametrize("late", ["processing", "failed"])
def test_a_broken_promise_is_noticed(late):
    """The checks are no decoration: a log in which an ended job hears more is refused."""
    world = simulation.simulate(1)
    video_id = next(job.id for job in world.app.jobs.values() if job.status == "completed")
    world.app.clock = lambda: 1e9
    body = f'{{"id": "local-{video_id}", "status": "{late}"}}'.encode()
    world.app.handle("POST", f"/api/i2v-webhook/{video_id}", {}, body)
    with pytest.raises(simulation.Broken, match=video_id):
        simulation.check(world)
