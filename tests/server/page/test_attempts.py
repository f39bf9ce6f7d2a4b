"""Wrong keys at sign-in cost time, more each time."""

import pytest

from inference.server.page.attempts import FORGOTTEN_S, FREE_TRIES, LONGEST_PAUSE_S, MAX_ADDRESSES, Attempts


@pytest.fixture
def clock():
    """A clock that the test sets."""
    return [0.0]


@pytest.fixture
def attempts(clock):
    """Nobody has tried anything yet."""
    return Attempts(lambda: clock[0])


def test_the_first_few_are_free(attempts):
    """People mistype."""
    for _ in range(FREE_TRIES):
        assert attempts.pause_s("a") == 0
        attempts.wrong("a")
    assert attempts.pause_s("a") == 2


def test_pauses_grow_up_to_a_limit_and_pass(attempts, clock):
    """Nobody can keep others out for long."""
    pauses = []
    for _ in range(FREE_TRIES + 8):
        attempts.wrong("a")
        pauses.append(attempts.pause_s("a"))
        clock[0] += pauses[-1]
        assert attempts.pause_s("a") == 0
    assert pauses[FREE_TRIES - 1 :] == [2, 4, 8, 16, 32, *[LONGEST_PAUSE_S] * 4]


def test_other_addresses_do_not_wait(attempts):
    """Each is counted by itself."""
    for _ in range(20):
        attempts.wrong("a")
    assert attempts.pause_s("b") == 0


def test_success_and_time_forgive(attempts, clock):
    """The right key, or an hour of quiet."""
    for _ in range(20):
        attempts.wrong("a")
        attempts.wrong("b")
    attempts.right("a")
    assert attempts.pause_s("a") == 0
    clock[0] += FORGOTTEN_S + 1
    attempts.wrong("b")
    assert attempts.pause_s("b") == 0


def test_memory_is_bounded(attempts):
    """An attacker with many addresses fills no memory."""
    for number in range(MAX_ADDRESSES + 10):
        attempts.wrong(str(number))
    assert len(attempts._tries) == MAX_ADDRESSES
