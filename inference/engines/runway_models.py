"""Runway's image-to-video models: what each takes and costs. No I/O: a dispatcher reads it, too.

From the official Python SDK 5.24 and Runway's price list (1 credit is $0.01), 2026-11.
"""

import math
from dataclasses import dataclass

from inference.errors import InvalidRequest
from inference.task import QUEUE_FPS

USD_PER_CREDIT = 0.01

GEN4_RATIOS = ("1280:720", "720:1280", "1104:832", "832:1104", "960:960", "1584:672")
VEO_RATIOS = ("1280:720", "720:1280", "1920:1080", "1080:1920")

VEO_SECONDS = (4, 6, 8)
GEN4_SECONDS = tuple(range(2, 11))


@dataclass(frozen=True, slots=True)
class Model:
    """One model as its API takes it."""

    name: str
    seconds: tuple[int, ...]  # lengths it makes, shortest first
    ratios: tuple[str, ...]  # sizes it makes, width:height in pixels
    credits_per_s: int  # the most it may cost: the API's own estimate follows after creation
    prompt_required: bool = False

    def billed_seconds(self, duration_s: float) -> int:
        """The length to order for a clip of `duration_s`: the nearest not below it, give or take a frame at 24 fps.

        121 frames are 5 s and a 24th, and are ordered as 5 s. Raises InvalidRequest beyond the longest.
        """
        wanted_s = duration_s - 1 / QUEUE_FPS
        for seconds in self.seconds:
            if seconds >= wanted_s - 1e-6:
                return seconds
        raise InvalidRequest(f"duration_s: {self.name} makes at most {self.seconds[-1]} s, not {duration_s:g} s")

    def cost_usd(self, duration_s: float) -> float:
        """Dollars for a clip of `duration_s`, at most. Raises InvalidRequest."""
        return math.ceil(self.billed_seconds(duration_s) * self.credits_per_s) * USD_PER_CREDIT


MODELS = {
    model.name: model
    for model in (
        Model("gen4_turbo", GEN4_SECONDS, GEN4_RATIOS, 5),
        Model("gen4.5", GEN4_SECONDS, GEN4_RATIOS, 12, prompt_required=True),
        Model("veo3.1", VEO_SECONDS, VEO_RATIOS, 40),
        Model("veo3.1_fast", VEO_SECONDS, VEO_RATIOS, 15),
    )
}

ALIASES = {"gen4.5_turbo": "gen4.5", "veo3": "veo3.1", "gen3a_turbo": "gen4_turbo"}
"""Names of the queue for models that are called otherwise today, or are gone."""


def model_for(provider: str | None, default: str) -> Model:
    """The model that a queue's hint names, or the default one where it names none of Runway's."""
    name = (provider or "").removeprefix("runway_")
    return MODELS.get(ALIASES.get(name, name)) or MODELS[default]
