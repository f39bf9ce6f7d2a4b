"""Wrong keys at sign-in: after several from one address, each further one costs a longer pause."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

FREE_TRIES = 5
"""Wrong keys without a pause: people mistype."""

FIRST_PAUSE_S = 2.0
"""Doubles with each further wrong key."""

LONGEST_PAUSE_S = 60.0
"""Behind a proxy all visitors have one address, so a stranger's tries may make others wait; for no longer than this."""

FORGOTTEN_S = 3600.0
MAX_ADDRESSES = 10_000


@dataclass(slots=True)
class _Tries:
    wrong: int
    last_at_s: float


class Attempts:
    """Who has tried wrong keys. For one event loop; forgotten when the server ends."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tries: OrderedDict[str, _Tries] = OrderedDict()  # by address, longest ago first

    def pause_s(self, address: str) -> float:
        """How long this address has to wait before its next try is looked at; 0 when it may try now."""
        tries = self._tries.get(address)
        if tries is None or tries.wrong < FREE_TRIES:
            return 0.0
        pause_s = min(FIRST_PAUSE_S * 2.0 ** min(tries.wrong - FREE_TRIES, 10), LONGEST_PAUSE_S)
        return max(0.0, tries.last_at_s + pause_s - self._clock())

    def wrong(self, address: str) -> None:
        """Counts a wrong key."""
        now_s = self._clock()
        tries = self._tries.pop(address, None)
        if tries is None or now_s - tries.last_at_s > FORGOTTEN_S:
            tries = _Tries(0, now_s)
        tries.wrong, tries.last_at_s = tries.wrong + 1, now_s
        self._tries[address] = tries
        if len(self._tries) > MAX_ADDRESSES:
            self._tries.popitem(last=False)

    def right(self, address: str) -> None:
        """Forgets an address."""
        self._tries.pop(address, None)
