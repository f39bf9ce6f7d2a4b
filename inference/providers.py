"""The providers: which engine serves a queue's hint, in which pool of containers, and whether its clips are paid for.

    provider      who makes a video: Wan on GPUs of our own, or Runway for money
    hint          how a task of a queue asks for a provider, or for one of its models; a task may have none
    worker_type   the name of a provider's engine, by which queues hand out its tasks and `I2V_ENGINE` names it
    pool          the containers in which that engine runs

A new provider is a row of `PROVIDERS`, and a new hint an entry in the row of whoever serves it. All else goes by this
table: what a queue hands to which worker, where a tick sends a task, and which engines are paid by the clip.

A hint that is not in the table says nothing that this version understands. Its task is made by the default provider,
which is a free one, and never by one that takes money: nobody is known to have agreed to that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

EngineName = Literal["preview", "wan", "runway", "comfyui"]
"""What makes videos. Two are nobody's provider: `preview` takes any task, to try things out, and `comfyui` runs the
operator's own graph, or the one that a task brings."""

QueueName = Literal["lifeisshort", "gmanimato", "video_jobs"]
"""Whose application the tasks come from, and so which protocol it speaks. The embedded server speaks the first;
`video_jobs` is a table in an application's own PostgreSQL."""

WorkerType = Literal["wan", "runway"]
"""The engines that a hint can ask for, as the wire of queues calls them."""

PoolName = Literal["gpu", "runway"]


@dataclass(frozen=True, slots=True)
class Provider:
    """One row of the table."""

    worker_type: WorkerType
    pool: PoolName
    is_paid: bool  # it takes money for each clip
    models: Mapping[str, str | None]  # its hints, and the model each means; None: any


def _both_spellings(models: Mapping[str, str]) -> dict[str, str | None]:
    """Queues write `gen4_turbo` and `runway_gen4_turbo` alike."""
    return {**models, **{f"runway_{hint}": model for hint, model in models.items()}}


WAN = Provider("wan", pool="gpu", is_paid=False, models={"wan_local": None})

RUNWAY = Provider(
    "runway",
    pool="runway",
    is_paid=True,
    models=_both_spellings(
        {
            "gen4_turbo": "gen4_turbo",
            "gen4.5": "gen4.5",
            "veo3.1": "veo3.1",
            "veo3.1_fast": "veo3.1_fast",
            # The queue's names for models that Runway calls otherwise, or has no more (engines/runway/models.py).
            "gen4.5_turbo": "gen4.5",
            "gen3a_turbo": "gen4_turbo",
            "veo3": "veo3.1",
        }
    ),
)

PROVIDERS = (WAN, RUNWAY)

DEFAULT = WAN
"""Serves tasks without a hint, or with one that is not in the table."""

PAID = RUNWAY
"""Where tasks of the default provider go on overflow."""

_BY_HINT = {hint: provider for provider in PROVIDERS for hint in provider.models}


def provider_of(hint: str | None) -> Provider:
    """Who serves a task with this hint."""
    return _BY_HINT.get(hint or "", DEFAULT)


def is_known(hint: str | None) -> bool:
    """Whether a hint is in the table; no hint at all is fine, too."""
    return not hint or hint in _BY_HINT


def model_of(hint: str | None) -> str | None:
    """The model of its provider that a hint means; None where any will do."""
    return provider_of(hint).models.get(hint or "")


def is_paid(engine: EngineName | None) -> bool:
    """Whether an engine takes money for each clip, so that what is paid for has to be written down; None: no engine."""
    return any(provider.is_paid for provider in PROVIDERS if provider.worker_type == engine)
