"""What a deployment on Modal needs to be able to work."""

import re
from contextlib import suppress

from inference.build.engines import import_wan
from inference.engines.runway.models import refuse_settings
from inference.engines.wan.presets import PRESETS
from inference.errors import SettingsError
from inference.fleet.containers import Sized
from inference.fleet.shape import COLD_START_MARGIN_S, INPUTS, Shape
from inference.providers import DEFAULT, PAID, PoolName
from inference.settings import Settings

CRON_FIELDS = 5

LISTEN_S = 540
"""Seconds for which a page follows live progress until it has to connect again. The function's timeout is longer, so
that Modal ends no request. An open stream keeps its container."""


CRON_FIELD = re.compile(r"[0-9A-Za-z*,/-]+")  # Modal's client does not check the expression


def on_modal(settings: Settings) -> Shape:
    """GPU containers, and Runway where there is a key."""
    gpus, clips = settings.modal_max_containers, settings.runway_concurrency
    sizes: dict[PoolName, Sized] = {DEFAULT.pool: Sized(slots=gpus * INPUTS, engines=gpus)}
    if settings.runway_key:
        sizes[PAID.pool] = Sized(slots=clips, engines=clips)
    return Shape(sizes=sizes, startup_timeout_s=settings.modal_startup_timeout_s)


def keys_of(settings: Settings) -> list[str]:
    """What the Modal secret has to hold."""
    if settings.queue == "video_jobs":
        keys = ["I2V_JOBS_DATABASE_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"]
    else:
        keys = ["VERCEL_API_URL", "WORKER_API_KEY"]
    keys += ["RUNWAYML_API_SECRET"] if settings.runway_key else []
    keys += ["VERCEL_AUTOMATION_BYPASS_SECRET"] if settings.vercel_bypass else []
    keys += ["REDIS_URL"] if settings.redis_url else []
    keys += ["I2V_PUSH_TOKEN"] if settings.push_token else []
    return keys


def calls_timeout_s(settings: Settings) -> int:
    """How long the web endpoint may work on one request: longer where live progress is followed over it."""
    return LISTEN_S + 60 if settings.redis_url else 60


def takes_calls(settings: Settings) -> bool:
    """Whether a web endpoint is deployed: only where somebody but everybody may call it."""
    return bool(settings.push_token or settings.push_audience)


def refuse_deployment(settings: Settings) -> None:
    """Raises SettingsError, one line a problem, for mistakes that otherwise only a container would find."""
    problems = []
    fields = settings.modal_cron.split()
    if len(fields) != CRON_FIELDS or not all(CRON_FIELD.fullmatch(each) for each in fields):
        problems.append(f"I2V_MODAL_CRON: {settings.modal_cron!r} is not a cron line of five fields, such as * * * * *")
    if settings.attempt_limit_s >= settings.modal_timeout_s:
        problems.append(
            f"I2V_MODAL_TIMEOUT ({settings.modal_timeout_s} s) has to be longer than I2V_ATTEMPT_LIMIT "
            f"({settings.attempt_limit_s:g} s): the platform would end a generation before its own limit does"
        )
    if (
        settings.queue == "video_jobs"
        and settings.jobs_stale_s < settings.modal_startup_timeout_s + COLD_START_MARGIN_S
    ):
        problems.append(
            f"I2V_JOBS_STALE ({settings.jobs_stale_s:g} s) has to be longer than I2V_MODAL_STARTUP_TIMEOUT "
            f"({settings.modal_startup_timeout_s} s) by {COLD_START_MARGIN_S:g} s: nobody beats for a job whose "
            "container is starting"
        )
    if settings.push_audience and not settings.push_callers.strip(" ,"):
        problems.append("I2V_PUSH_CALLERS: list the service accounts that may call, since I2V_PUSH_AUDIENCE is set")
    unfree = [each for each in PRESETS[settings.wan_preset].repositories if not each.commercial_use]
    if unfree and not settings.accept_non_commercial:
        problems.append(
            f"I2V_WAN_PRESET: {unfree[0].name} is for non-commercial use only ({unfree[0].license}): "
            "if yours is, set I2V_ACCEPT_NON_COMMERCIAL=true"
        )
    problems += [
        f"{name}: {value!r} has a line break, which an image cannot hold"
        for name, value in settings.for_containers().items()
        if not value.isprintable()
    ]
    if settings.runway_key:
        try:
            refuse_settings(settings.runway_model, settings.runway_ratio)
        except SettingsError as error:
            problems.append(str(error))
    if problems:
        raise SettingsError("\n".join(problems))


def import_engine() -> None:
    """Imports the Wan engine, which takes longer than anything else that needs no GPU."""
    with suppress(Exception):  # loading the engine meets the same error later, and reports it
        import_wan()
