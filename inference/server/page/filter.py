"""Which part of the list is asked for, as it stands in addresses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args
from urllib.parse import urlencode

from inference.queues.item import Status

STATUSES: Sequence[Status] = get_args(Status)


@dataclass(frozen=True, slots=True)
class Filter:
    """What part of the list is asked for."""

    status: Status | None = None
    group: str | None = None
    before: str | None = None  # id of the last task of the page before

    @classmethod
    def of(cls, query: Mapping[str, str]) -> "Filter":
        """From the query of an address; what makes no sense there is left out."""
        wanted = query.get("status")
        status = next((status for status in STATUSES if status == wanted), None)
        return cls(status, _id(query.get("group")), _id(query.get("before")))

    def address(self, **changed: str | None) -> str:
        """The page that shows this part of the list, relative to the page itself: "./?status=failed"."""
        query = {"status": self.status, "group": self.group, "before": self.before} | changed
        text = urlencode({name: value for name, value in query.items() if value})
        return f"./?{text}" if text else "./"

    @property
    def query(self) -> str:
        """The same as a query alone, with its question mark, or nothing."""
        return self.address().removeprefix("./")


def _id(text: str | None) -> str | None:
    return text if text and len(text) <= 200 and text.isprintable() else None
