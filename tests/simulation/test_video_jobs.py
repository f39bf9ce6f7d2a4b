"""The promises of pushed jobs over many seeds. More of them: `python -m tests.simulation.video_jobs --seeds 10000`."""

import pytest

from inference.testing.memory_jobs import Event
from tests.simulation import leases
from tests.simulation import video_jobs as simulation

SEEDS, CHUNK = 20, 20


@pytest.fixture(autouse=True)
def _quiet():
    leases.quiet()


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_promises_hold_in_every_world(first):
    """Whatever is lost, killed, paused or cancelled: every job ends once, fenced, and a cancel that came first wins."""
    worlds = [simulation.simulate(seed) for seed in range(first, first + CHUNK)]
    ends = {job.status for world in worlds for job in world.jobs.rows.values()}
    assert ends == {"completed", "failed", "canceled"}  # otherwise the storms are too mild or too wild to show much
    assert any(job.crashes for world in worlds for job in world.jobs.rows.values())


def test_a_seed_replays_exactly():
    """A failing seed is worth something only if it fails again in the same way."""

    def story(seed):
        log = simulation.simulate(seed).jobs.log
        return [(event.at_s, event.verb, event.job_id, event.accepted, event.status) for event in log]

    for seed in (3, 8, 105):
        assert story(seed) == story(seed)


def test_a_broken_promise_is_noticed():
    """The checks are no decoration: a log in which an ended job is written to again is refused."""
    world = simulation.simulate(1)
    job = next(job for job in world.jobs.rows.values() if job.status == "completed")
    world.jobs.log.append(Event(1e9, "beat", job.id, "somebody", accepted=True, status="completed"))
    with pytest.raises(leases.Broken, match="was accepted"):
        simulation.check(world)
