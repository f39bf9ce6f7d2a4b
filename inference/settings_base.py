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

PREFIXES = ("I2V_", "GMANIMATO_", "RUNWAY_")
"""Prefixes that only this project and the documents of its workers use, so that an unknown name with one of them is a
mistake. Any other name may be another program's, and is one only where it is a slip of the pen: see `_is_slip`."""

TELLING = ("LEASE_", "HEARTBEAT_", "POLL", "RUNWAYML_")
"""Names that begin so, or have three words or more, are hardly any other program's. `LOGDIR` and `TEMPDIR` may be."""

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
            problems = [_problem(cls, each) for each in error.errors(include_url=False)]
            # A setting that is missing may be there under a name with a letter too few.
            problems += [line for line in cls.unread() if line.endswith("?")]
            raise SettingsError("\n".join(problems)) from None

    @classmethod
    def unread(cls) -> list[str]:
        """One line for each variable of the environment and `.env` that looks like a setting but is not read.

        It says the name that may have been meant, where there is one, and never the value.
        """
        known = {name for field in cls.model_fields.values() for name in names_of(field)}
        sources = (EnvSettingsSource(cls), DotEnvSettingsSource(cls))
        # pydantic's sources hold names in lower case.
        given = {name.upper() for source in sources for name in source.env_vars}
        lines = []
        for name in sorted(given - known):
            if meant := _meant(name, known, given):
                lines.append(f"nothing reads {name}: did you mean {meant}?")
            elif name.startswith(PREFIXES):
                lines.append(f"nothing reads {name}: it is no setting")
        return lines

    @classmethod
    def warn_of_unread(cls) -> None:
        """Logs a warning for each of them."""
        for line in cls.unread():
            log.warning(line)

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

            @classmethod
            def unread(cls) -> list[str]:
                return []

        return cast("Self", Isolated.load(**given))


def _requiring(base: type[S], names: list[str]) -> type[S]:
    """The same settings with some of them required, so that pydantic reports missing ones with all other mistakes."""
    fields = {name: copy.copy(base.model_fields[name]) for name in names}
    for field in fields.values():
        field.default = PydanticUndefined
    annotations = {name: field.annotation for name, field in fields.items()}
    namespace = {"__module__": base.__module__, "__annotations__": annotations, **fields}
    return cast("type[S]", type(base.__name__, (base,), namespace))


def _meant(name: str, known: set[str], given: set[str]) -> str | None:
    """The setting that was meant by a name that is none; None where it may well be another program's."""
    if name.startswith(PREFIXES):
        return next(iter(get_close_matches(name, known, n=1, cutoff=0.8)), None)
    unmistakable = (each for each in known - given if each.startswith(TELLING) or each.count("_") > 1)
    return next((each for each in sorted(unmistakable) if _is_slip(name, each)), None)


def _is_slip(given: str, meant: str) -> bool:
    """Whether the names differ by underscores, one letter too many or too few, or two letters that changed places.

    Another letter in a place is none: NEXT_APP_URL is not NEXT_API_URL.
    """
    shorter, longer = sorted((given.replace("_", ""), meant.replace("_", "")), key=len)
    if len(longer) == len(shorter):
        places = [place for place in range(len(longer)) if longer[place] != shorter[place]]
        if len(places) != 2:
            return not places
        first, second = places
        return second == first + 1 and longer[first] + longer[second] == shorter[second] + shorter[first]
    return any(longer[:place] + longer[place + 1 :] == shorter for place in range(len(longer)))


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
