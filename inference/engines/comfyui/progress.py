"""How far a run is, from ComfyUI's websocket messages."""

from collections.abc import Mapping
from typing import Any

DEFAULT_WEIGHT = 1.0
"""Of a node that nobody gave a weight, as in GmAnimato's own worker: its heavy nodes have 15 to 60."""

FINISHED = 1.0


class RunProgress:
    """The share of each node that is done. None of them ever falls, so neither does the sum.

    Newer servers send a snapshot of all nodes (`progress_state`). Older ones say which node starts (`executing`) and
    how far it is (`progress`); those messages are ignored once a snapshot was heard, because with nodes that run beside
    each other a node that starts does not mean that another has ended.
    """

    def __init__(self, graph: Mapping[str, Any], weights: Mapping[str, float]) -> None:
        self._weights = {node: max(weights.get(node, DEFAULT_WEIGHT), 0.0) for node in graph}
        if not any(self._weights.values()):
            self._weights = dict.fromkeys(graph, DEFAULT_WEIGHT)
        self._shares = dict.fromkeys(graph, 0.0)
        self._current: str | None = None
        self._has_snapshots = False

    @property
    def total(self) -> float:
        """The weight of all nodes. Those that no output needs never run, so a run can end below it."""
        return sum(self._weights.values())

    @property
    def done(self) -> float:
        """The weight of what is done."""
        return min(sum(self._weights[node] * share for node, share in self._shares.items()), self.total)

    @property
    def detail(self) -> dict[str, Any]:
        """For queues that show nodes. `current_node` is its id, `current_node_progress` in percent."""
        share = self._shares.get(self._current, 0.0) if self._current else 0.0
        return {
            "completed_nodes": sum(share >= FINISHED for share in self._shares.values()),
            "total_nodes": len(self._shares),
            "current_node": self._current,
            "current_node_progress": round(100 * share, 1),
        }

    def hear(self, kind: str, data: Mapping[str, Any]) -> bool:
        """Takes one message of this run. Returns whether it said anything about progress; odd ones say nothing."""
        if kind == "execution_cached" and isinstance(data.get("nodes"), list):
            for node in data["nodes"]:
                self._advance(node, FINISHED)
        elif kind == "progress_state" and isinstance(data.get("nodes"), dict):
            self._has_snapshots = True
            for node, state in data["nodes"].items():
                if isinstance(state, dict):
                    self._take(node, state)
        elif kind == "executed":
            self._advance(data.get("node"), FINISHED)
        elif kind == "executing" and not self._has_snapshots:
            self._advance(self._current, FINISHED)
            self._current = node if isinstance(node := data.get("node"), str) else None
        elif kind == "progress" and not self._has_snapshots:
            self._current = node if isinstance(node := data.get("node"), str) else self._current
            self._advance(self._current, _share(data))
        else:
            return False
        return True

    def finish(self) -> None:
        """The run has ended well, whatever was heard of it."""
        self._shares = dict.fromkeys(self._shares, FINISHED)
        self._current = None

    def _take(self, node: str, state: Mapping[str, Any]) -> None:
        self._advance(node, FINISHED if state.get("state") == "finished" else _share(state))
        if state.get("state") == "running":
            shown = state.get("display_node_id")  # of nodes that a node unfolds into, the one in the graph
            self._current = shown if isinstance(shown, str) and shown in self._shares else node

    def _advance(self, node: object, share: float) -> None:
        if isinstance(node, str) and node in self._shares:
            self._shares[node] = max(self._shares[node], share)


def _share(state: Mapping[str, Any]) -> float:
    value, maximum = state.get("value"), state.get("max")
    if not isinstance(value, int | float) or not isinstance(maximum, int | float) or not maximum > 0:
        return 0.0
    share = value / maximum
    return min(max(share, 0.0), FINISHED) if share == share else 0.0  # noqa: PLR0124  JSON of Python's may hold NaN
