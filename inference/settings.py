"""What can be configured, and the only reader of the environment.

Names that the documents of the systems we serve use are kept as they are; all others start with I2V_. A `.env`
file in the working directory is read too; the environment wins over it. `python -m inference.settings` prints the
contents of `.env.example`.
"""

import copy
import socket
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, cast

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from inference.engines.wan.presets import PRESETS
from inference.errors import SettingsError
from inference.queues.lifeisshort_wire import worker_api_url

S = TypeVar("S", bound="Settings")
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Bytes = Annotated[int, Field(gt=0)]


def _setting(default: Any, *names: str, about: str) -> Any:
    return Field(default, validation_alias=AliasChoices(*names), description=about)


class Settings(BaseSettings):
    """Every setting, with its unit and default. Build it with `Settings.load`."""

    model_config = SettingsConfigDict(
        env_file=".env", env_file_encoding="utf-8", env_ignore_empty=True, extra="ignore", frozen=True
    )

    # The queue a worker takes its tasks from
    api_url: str | None = _setting(
        None, "VERCEL_API_URL", "NEXT_API_URL", about="Base URL of the queue, with or without /api. Required to work."
    )
    api_key: SecretStr | None = _setting(
        None, "WORKER_API_KEY", about="Key of the queue; the embedded server asks for the same one."
    )
    auth_scheme: Literal["worker", "bearer"] = _setting(
        "worker", "I2V_AUTH_SCHEME", about="How the key is sent: `worker` or `bearer`."
    )
    worker_id: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._:-]+$")] = _setting(
        "", "WORKER_ID", about="Name of this worker in the queue; every lease adds its own suffix. Default: host name."
    )
    worker_type: Literal["wan", "runway"] | None = _setting(
        None, "I2V_WORKER_TYPE", about="Take only tasks of this kind: `wan` or `runway`. Default: any."
    )
    poll_interval_s: Annotated[float, Field(ge=0.1, le=3600)] = _setting(
        5.0, "POLL_INTERVAL", about="Seconds between questions to an empty queue."
    )
    lease_duration_s: Annotated[float, Field(ge=2, le=86_400)] = _setting(
        600.0, "LEASE_DURATION", about="Seconds for which a task is taken: longer than a cold start."
    )
    lease_extension_s: Annotated[float, Field(ge=2, le=86_400)] = _setting(
        300.0, "I2V_LEASE_EXTENSION", about="Seconds that each heartbeat adds; a silent worker's task is free after it."
    )
    heartbeat_interval_s: Seconds = _setting(
        120.0, "HEARTBEAT_INTERVAL", about="Seconds between heartbeats; at most half of I2V_LEASE_EXTENSION."
    )

    # The worker
    engine: Literal["preview", "wan"] = _setting(
        "preview",
        "I2V_ENGINE",
        about="What makes the videos. `preview`: a camera move over the photo, no model. `wan`: Wan2.2 on this GPU.",
    )
    concurrency: Annotated[int, Field(ge=1, le=64)] = _setting(
        2, "I2V_CONCURRENCY", about="Tasks held at once: one generates while the others download and upload."
    )
    attempt_limit_s: Seconds = _setting(
        1800.0, "I2V_ATTEMPT_LIMIT", about="Seconds after which a generation counts as hung."
    )
    shutdown_grace_s: Annotated[float, Field(ge=0, le=3600)] = _setting(
        8.0, "I2V_SHUTDOWN_GRACE", about="Seconds to finish in after SIGTERM, then tasks are handed back."
    )
    max_photo_bytes: Bytes = _setting(50_000_000, "I2V_MAX_PHOTO_BYTES", about="Bytes of the largest photo taken.")
    allow_private_addresses: bool = _setting(
        False,
        "I2V_ALLOW_PRIVATE_ADDRESSES",
        about="Let presigned URLs lead to private addresses, other than the queue's own host.",
    )
    temp_dir: Path | None = _setting(None, "TEMP_DIR", about="Folder for temporary files. Default: the system's.")
    auto_cleanup_temp: bool = _setting(
        True, "AUTO_CLEANUP_TEMP", about="Remove each task's temporary files when it ends; `false` leaves them."
    )
    log_dir: Path | None = _setting(None, "LOG_DIR", about="Folder for a log file besides the terminal. Default: none.")
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "I2V_LOG_LEVEL", about="`debug`, `info`, `warning` or `error`."
    )

    # The Wan engine
    wan_preset: str = _setting(
        "a14b-fast", "I2V_WAN_PRESET", about=f"Model and schedule, one of {', '.join(f'`{name}`' for name in PRESETS)}."
    )
    weights_dir: Path = _setting(
        Path("~/.cache/serverless-i2v"), "I2V_WEIGHTS_DIR", about="Folder of the weights; `i2v weights fetch` fills it."
    )
    hf_token: SecretStr | None = _setting(
        None, "HF_TOKEN", about="Token of huggingface.co, for `i2v weights fetch`; public weights need none."
    )
    wan_area_px: Annotated[int, Field(ge=64 * 64)] | None = _setting(
        None, "I2V_WAN_AREA", about="Largest width x height of a clip; 399360 is 480p. Default: the preset's, 720p."
    )
    wan_offload: Literal["auto", "none", "text", "models", "blocks"] = _setting(
        "auto",
        "I2V_WAN_OFFLOAD",
        about="What visits the GPU instead of staying: `none`, the `text` encoder, all `models`, or `blocks` of them. "
        "`auto` goes by its memory.",
    )
    wan_attention: str = _setting(
        "auto", "I2V_WAN_ATTENTION", about="Attention backend of diffusers; `auto` takes the fastest installed."
    )
    wan_compile: bool = _setting(
        False, "I2V_WAN_COMPILE", about="Compile the transformer: a slower start, then faster clips."
    )
    wan_fp8: bool = _setting(
        False, "I2V_WAN_FP8", about="Keep the transformers in 8 bits: half the memory, a little less exact."
    )

    # The embedded queue server
    host: str = _setting("127.0.0.1", "I2V_HOST", about="Address the server binds to; others than loopback need a key.")
    port: Annotated[int, Field(ge=0, le=65535)] = _setting(8000, "I2V_PORT", about="Port of the server; 0 picks one.")
    data_dir: Path = _setting(Path("i2v-data"), "I2V_DATA_DIR", about="Folder of the server's database and objects.")
    database_url: SecretStr | None = _setting(
        None, "I2V_DATABASE_URL", about="SQLAlchemy URL, e.g. postgresql://… Default: SQLite in I2V_DATA_DIR."
    )
    public_url: str | None = _setting(
        None, "I2V_PUBLIC_URL", about="URL under which clients reach the server, for presigned URLs. Default: as asked."
    )
    max_video_bytes: Bytes = _setting(500_000_000, "I2V_MAX_VIDEO_BYTES", about="Bytes of the largest upload taken.")

    @field_validator("api_url", "public_url")
    @classmethod
    def _is_a_url(cls, value: str | None) -> str | None:
        scheme, _, rest = (value or "https://x").strip().partition("://")
        if scheme.lower() not in ("http", "https") or not rest.strip("/"):
            raise ValueError("has to be a URL such as https://app.example.com")
        return value.strip() if value else None

    @field_validator("api_url")
    @classmethod
    def _is_safe_for_the_key(cls, value: str | None) -> str | None:
        try:
            if value:
                worker_api_url(value)
        except SettingsError as error:
            raise ValueError(str(error).removeprefix("VERCEL_API_URL: ")) from None
        return value

    @field_validator("api_key")
    @classmethod
    def _fits_into_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        key = value.get_secret_value() if value else ""
        if not key.isascii() or not key.isprintable():
            raise ValueError("has to be printable ASCII")
        return value

    @field_validator("wan_preset")
    @classmethod
    def _is_a_preset(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(f"there is no preset {value!r}; choose one of {', '.join(PRESETS)}")
        return value

    @field_validator("weights_dir")
    @classmethod
    def _of_a_person(cls, value: Path) -> Path:
        return value.expanduser()

    @field_validator("worker_id", mode="before")
    @classmethod
    def _host_name(cls, value: object) -> object:
        return value or socket.gethostname()

    @model_validator(mode="after")
    def _beats_fit(self) -> Self:
        if self.heartbeat_interval_s > self.lease_extension_s / 2:
            raise ValueError(
                f"HEARTBEAT_INTERVAL ({self.heartbeat_interval_s:g} s) has to be at most half of "
                f"I2V_LEASE_EXTENSION ({self.lease_extension_s:g} s): one late beat must not lose the lease"
            )
        return self

    @classmethod
    def load(cls, *required: str, **overrides: Any) -> Self:
        """Reads and validates everything; `required` names fields that must be set, `overrides` win over all else.

        Raises SettingsError with one line for each problem, all problems at once.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        demanding = _requiring(cls, [name for name in required if name not in given])
        aliases = {name: _names(field)[0] for name, field in cls.model_fields.items()}
        try:
            return demanding(**{aliases[name]: value for name, value in given.items()})
        except ValidationError as error:
            raise SettingsError("\n".join(_problem(cls, each) for each in error.errors(include_url=False))) from None

    @classmethod
    def isolated(cls, **given: Any) -> Self:
        """Settings from `given` and the defaults alone. Raises SettingsError."""

        class Isolated(cls):  # type: ignore[valid-type,misc]
            @classmethod
            def settings_customise_sources(
                cls, settings_cls: type[BaseSettings], init_settings: Any, **_others: Any
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                del settings_cls
                return (init_settings,)

        return cast("Self", Isolated.load(**given))


def _requiring(base: type[S], names: list[str]) -> type[S]:
    """The same settings with some of them required, so that pydantic reports a missing one beside all else."""
    fields = {name: copy.copy(base.model_fields[name]) for name in names}
    for field in fields.values():
        field.default = PydanticUndefined
    annotations = {name: field.annotation for name, field in fields.items()}
    namespace = {"__module__": base.__module__, "__annotations__": annotations, **fields}
    return cast("type[S]", type(base.__name__, (base,), namespace))


def _names(field: FieldInfo) -> list[str]:
    alias = field.validation_alias
    return [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else []


def _problem(settings: type[Settings], error: ErrorDetails) -> str:
    """One line from one of pydantic's errors, under the name people set it by. Never the value: it may be a key."""
    location, message, kind = error["loc"], error["msg"], error["type"]
    if not location:
        return message.removeprefix("Value error, ")
    known = {alias: field for field in settings.model_fields.values() for alias in _names(field)}
    name = str(location[0])
    if kind == "missing":
        names = _names(known[name])
        return f"{' or '.join(names)} is not set: {known[name].description}"
    message = message.removeprefix("Value error, ")
    return f"{name}: {message[0].lower()}{message[1:]}"


def example() -> str:
    """The contents of `.env.example`: every setting, commented out, with its meaning, unit and default."""
    lines = ["# Every setting of serverless-i2v. Copy to `.env` and uncomment what you need.", ""]
    for field in Settings.model_fields.values():
        names = _names(field)
        also = f" (also {', '.join(names[1:])})" if names[1:] else ""
        lines += [f"# {line}" for line in textwrap.wrap(f"{field.description}{also}", 100)]
        default = field.default
        shown = "" if default is None else str(default).lower() if isinstance(default, bool) else default
        shown = f"{shown:g}" if isinstance(shown, float) else shown
        lines += [f"# {names[0]}={shown}", ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(example(), end="")  # noqa: T201 - printing is what it is for
