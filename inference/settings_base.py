"""Reads settings from the environment and reports mistakes in them; `settings.py` lists the settings."""

import copy
from difflib import get_close_matches
from typing import Any, Self, TypeVar, cast

import structlog
from pydantic import AliasChoices, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from inference.errors import SettingsError

PREFIXES = ("I2V_", "GMANIMATO_", "RUNWAY_", "RUNWAYML_", "BUCKET_", "LEASE_", "HEARTBEAT_", "POLL_", "POLLING_")
"""Prefixes that only this project uses, so that an unknown name with one of them is a mistake. VERCEL_, MODAL_ and
RUNPOD_ are left out, because those platforms set variables of their own."""

log = structlog.get_logger(__name__)

S = TypeVar("S", bound="LoadableSettings")


def setting(default: Any, *names: str, about: str) -> Any:
    """One setting, with its names in the environment; messages use the first."""
    return Field(default, validation_alias=AliasChoices(*names), description=about)


class LoadableSettings(BaseSettings):
    """Settings from the environment and `.env`, with all mistakes reported at once."""

    model_config = SettingsConfigDict(
        env_file=".env", env_file_encoding="utf-8", env_ignore_empty=True, extra="ignore", frozen=True
    )

    @classmethod
    def load(cls, *required: str, **overrides: Any) -> Self:
        """Reads and validates everything; `required` fields must be set, and `overrides` take precedence.

        Raises SettingsError with one line for each problem, all problems at once.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        demanding = _requiring(cls, [name for name in required if name not in given])
        aliases = {name: names_of(field)[0] for name, field in cls.model_fields.items()}
        try:
            return demanding(**{aliases[name]: value for name, value in given.items()})
        except ValidationError as error:
            raise SettingsError("\n".join(_problem(cls, each) for each in error.errors(include_url=False))) from None

    def unread(self) -> list[str]:
        """Variables in the environment and `.env` that look like settings but are not read.

        Each with the name that may have been meant.
        """
        known = {name for field in type(self).model_fields.values() for name in names_of(field)}
        sources = (EnvSettingsSource(type(self)), DotEnvSettingsSource(type(self)))
        # pydantic's sources hold names in lower case.
        given = {name.upper() for source in sources for name in source.env_vars}
        return [_unread(name, known) for name in sorted(given - known) if name.startswith(PREFIXES)]

    def warn_of_unread(self) -> None:
        """Logs one line about all of them."""
        if names := self.unread():
            log.warning("settings_not_read", names=names)

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
    """The same settings with some of them required, so that pydantic reports missing ones with all other mistakes."""
    fields = {name: copy.copy(base.model_fields[name]) for name in names}
    for field in fields.values():
        field.default = PydanticUndefined
    annotations = {name: field.annotation for name, field in fields.items()}
    namespace = {"__module__": base.__module__, "__annotations__": annotations, **fields}
    return cast("type[S]", type(base.__name__, (base,), namespace))


def _unread(name: str, known: set[str]) -> str:
    meant = get_close_matches(name, known, n=1, cutoff=0.8)
    return f"{name} ({meant[0]}?)" if meant else name


def names_of(field: FieldInfo) -> list[str]:
    alias = field.validation_alias
    return [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else []


def _problem(settings: type[LoadableSettings], error: ErrorDetails) -> str:
    """One of pydantic's errors in one line, with the setting's name, but without its value, which may be a key."""
    location, message, kind = error["loc"], error["msg"], error["type"]
    if not location:
        return message.removeprefix("Value error, ")
    known = {alias: field for field in settings.model_fields.values() for alias in names_of(field)}
    name = str(location[0])
    if kind == "missing":
        names = names_of(known[name])
        return f"{' or '.join(names)} is not set: {known[name].description}"
    message = message.removeprefix("Value error, ")
    return f"{name}: {message[0].lower()}{message[1:]}"
