"""Runway's image-to-video models: what each takes and costs. No I/O: a dispatcher reads it, too.

From the official Python SDK 5.24 and Runway's price list (1 credit is $0.01), 2026-11.
"""

import math
from dataclasses import dataclass

from inference.errors import InvalidRequest, SettingsError
from inference.providers import is_known, model_of
from inference.task import MIN_DURATION_S, QUEUE_FPS, GenerationRequest

USD_PER_CREDIT = 0.01

GEN4_RATIOS = ("1280:720", "720:1280", "1104:832", "832:1104", "960:960", "1584:672")
VEO_RATIOS = ("1280:720", "720:1280", "1920:1080", "1080:1920")

VEO_SECONDS = (4, 6, 8)
GEN4_SECONDS = tuple(range(2, 11))

MAX_PROMPT_UNITS = 1000
"""UTF-16 code units of a prompt, as Runway counts them: an emoji is two."""

MAX_SEED = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Model:
    """One model as its API takes it."""

    name: str
    seconds: tuple[int, ...]  # lengths it makes, shortest first
    ratios: tuple[str, ...]  # sizes it makes, width:height in pixels
    credits_per_s: int  # the most it may cost, silent: the API's own estimate follows after creation
    sound_credits_per_s: int | None = None  # the same with sound; None: its clips are always silent
    prompt_required: bool = False
    takes_negative_prompt: bool = False

    def billed_seconds(self, duration_s: float) -> int:
        """The length to order for a clip of `duration_s`: the nearest not below it, give or take a frame at 24 fps.

        121 frames are 5 s and a 24th, and are ordered as 5 s. Raises InvalidRequest outside of what it makes.
        """
        if not MIN_DURATION_S <= duration_s <= self.seconds[-1] + 1 / QUEUE_FPS + 1e-6:
            raise InvalidRequest(
                f"duration_s is {duration_s:g}; {self.name} makes {MIN_DURATION_S:g} to {self.seconds[-1]} s"
            )
        return next(seconds for seconds in self.seconds if seconds >= duration_s - 1 / QUEUE_FPS - 1e-6)

    def cut_s(self, duration_s: float) -> float | None:
        """Where to cut what `billed_seconds` ordered; None where it is right as it is. Raises InvalidRequest."""
        return duration_s if self.billed_seconds(duration_s) - duration_s > 1 / QUEUE_FPS else None

    def usd_per_s(self, *, audio: bool) -> float:
        """Dollars for a second that is billed, at most; `audio`: with sound, where it makes any."""
        with_sound = self.sound_credits_per_s if audio else None
        return (with_sound or self.credits_per_s) * USD_PER_CREDIT

    def cost_usd(self, duration_s: float, *, audio: bool) -> float:
        """Dollars for a clip of `duration_s`, at most. Raises InvalidRequest."""
        return self.billed_seconds(duration_s) * self.usd_per_s(audio=audio)

    def nearest_ratio(self, width: int, height: int) -> str:
        """The size whose shape is nearest to that of an upright photo; of two alike, the smaller."""

        def distance(ratio: str) -> float:
            wide, tall = map(int, ratio.split(":"))
            return abs(math.log(wide * height / (tall * width)))

        return min(self.ratios, key=distance)

    def ratio_for(self, configured: str | None, width: int, height: int) -> str:
        """The configured size; where this model does not make it, the nearest to the photo's: no task fails for it."""
        return configured if configured in self.ratios else self.nearest_ratio(width, height)

    def refuse(self, request: GenerationRequest) -> None:
        """Raises InvalidRequest for what this model cannot do, naming the field. Costs nothing."""
        self.billed_seconds(request.duration_s)
        units = len(request.prompt.strip().encode("utf-16-le")) // 2
        if units > MAX_PROMPT_UNITS:
            raise InvalidRequest(f"prompt has {units} UTF-16 code units; {self.name} takes {MAX_PROMPT_UNITS}")
        if request.seed is not None and request.seed > MAX_SEED:
            raise InvalidRequest(f"seed is {request.seed}; {self.name} takes 0 to {MAX_SEED}")
        for field in ("negative_prompt", "steps", "guidance"):
            if getattr(request, field) and not (field == "negative_prompt" and self.takes_negative_prompt):
                raise InvalidRequest(f"{field} is given; {self.name} is used without")


MODELS = {
    model.name: model
    for model in (
        Model("gen4_turbo", GEN4_SECONDS, GEN4_RATIOS, 5),
        Model("gen4.5", GEN4_SECONDS, GEN4_RATIOS, 12, prompt_required=True),
        Model("veo3.1", VEO_SECONDS, VEO_RATIOS, 20, sound_credits_per_s=40, takes_negative_prompt=True),
        Model("veo3.1_fast", VEO_SECONDS, VEO_RATIOS, 10, sound_credits_per_s=15, takes_negative_prompt=True),
    )
}


def refuse_settings(model: str, ratio: str | None) -> None:
    """Raises SettingsError where there is no such model, or where it does not make the configured size."""
    if model not in MODELS:
        raise SettingsError(f"RUNWAY_MODEL: there is no model {model!r}; choose one of {', '.join(MODELS)}")
    ratios = MODELS[model].ratios
    if ratio is not None and ratio not in ratios:
        raise SettingsError(f"RUNWAY_DEFAULT_RATIO: {model} makes {', '.join(ratios)}, and not {ratio}")


GONE = {"gen3a_turbo", "runway_gen3a_turbo"}
"""Hints at models that Runway has no more; `providers.RUNWAY` says which has taken their place."""


def model_for(hint: str | None, default: str) -> Model:
    """The model that a queue's hint means, or the default one where it means none of Runway's.

    Raises InvalidRequest for a hint that no provider has: it may mean another service, and here it would cost money.
    """
    if not is_known(hint):
        raise InvalidRequest(f"provider is {hint!r}, which this version does not know, so nothing is paid for it")
    return MODELS[model_of(hint) or default]


def is_gone(hint: str | None) -> bool:
    """Whether a hint is for a model that another has taken the place of."""
    return hint in GONE
