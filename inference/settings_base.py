"""Reads settings from the environment and reports mistakes in them; `settings.py` lists the settings."""

import copy
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast

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

from inference import config_file
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
        env_file=".env", env_file_encoding="utf-8-sig", env_ignore_empty=True, extra="ignore", frozen=True
    )

    FILE_NAMES: ClassVar[Mapping[str, str]] = {}
    """Fields, by further names that a file of settings may use for them."""

    FILE_EXTRAS: ClassVar[Mapping[str, str]] = {}
    """Names that such a file may have although nothing reads them, with the reason."""

    OPTION_NAMES: ClassVar[Mapping[str, str]] = {}
    """What mistakes in `overrides` are told as, by field: the option that gave the value. Others by their own names."""

    @classmethod
    def load(cls, *required: str, config: Path | None = None, **overrides: Any) -> Self:
        """Reads and validates everything; `required` fields must be set.

        `overrides` go before the environment, that before `.env`, and that before the file `config`.
        Raises SettingsError with one line for each problem, all problems at once.
        """
        try:
            return cls._load(required, config, overrides)
        except UnicodeDecodeError:
            raise SettingsError(f"{cls.model_config['env_file']} is not UTF-8") from None

    @classmethod
    def _load(cls, required: tuple[str, ...], config: Path | None, overrides: Mapping[str, Any]) -> Self:
        given = {name: value for name, value in overrides.items() if value is not None}
        from_file = cls._from_file(config) if config is not None else {}
        aliases = {name: names_of(field)[0] for name, field in cls.model_fields.items()}
        told_as = {aliases[name]: f"{config}: {key}" for name, (key, _) in from_file.items()}
        told_as |= {aliases[name]: cls.OPTION_NAMES.get(name, aliases[name]) for name in given}
        given = {name: value for name, (_, value) in from_file.items()} | given
        demanding = _requiring(cls, [name for name in required if name not in given])
        try:
            return demanding(**{aliases[name]: value for name, value in given.items()})
        except ValidationError as error:
            problems = [_problem(cls, each, told_as) for each in error.errors(include_url=False)]
            # A setting that is missing may be there under a name with a letter too few.
            problems += [line for line in cls.unread() if line.endswith("?")]
            raise SettingsError("\n".join(problems)) from None

    @classmethod
    def _from_file(cls, path: Path) -> dict[str, tuple[str, str]]:
        """Fields that only the file sets: its own name for each, and the value. Raises SettingsError."""
        environment = _environment(cls)
        names = {alias.lower(): field for field, info in cls.model_fields.items() for alias in names_of(info)}
        names |= cls.FILE_NAMES
        found, unknown = {}, []
        for key, value in config_file.read(path, environment).items():
            field = names.get(key.lower())
            if field is None:
                if key.lower() not in cls.FILE_EXTRAS:
                    meant = get_close_matches(key.lower(), names, n=1, cutoff=0.8)
                    hint = f": did you mean {meant[0]}?" if meant else ""
                    unknown.append(f"--config: {path}: there is no {key}{hint}")
                continue
            if not any(alias in environment for alias in names_of(cls.model_fields[field])):
                found[field] = (key, value)
        if unknown:
            raise SettingsError("\n".join(unknown))
        return found

    @classmethod
    def unread(cls) -> list[str]:
        """One line for each variable of the environment and `.env` that looks like a setting but is not read.

        It says the name that may have been meant, where there is one, and never the value.
        """
        known = {name for field in cls.model_fields.values() for name in names_of(field)}
        given = set(_environment(cls))
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


def _environment(settings: type[LoadableSettings]) -> dict[str, str]:
    """Variables of the environment and, behind it, of `.env`, by their names in capitals; empty ones are not set."""
    found = dict(DotEnvSettingsSource(settings).env_vars) | dict(EnvSettingsSource(settings).env_vars)
    return {name.upper(): value for name, value in found.items() if value}  # pydantic has names in lower case


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


def _problem(settings: type[LoadableSettings], error: ErrorDetails, told_as: Mapping[str, str]) -> str:
    """One of pydantic's errors in one line, with the setting's name, but without its value, which may be a key.

    `told_as`: what those of a file or of options are called there, by the name that they have in the environment.
    """
    location, message, kind = error["loc"], error["msg"], error["type"]
    if not location:
        return message.removeprefix("Value error, ")
    known = {alias: field for field in settings.model_fields.values() for alias in names_of(field)}
    name = str(location[0])
    if kind == "missing":
        names = names_of(known[name])
        return f"{' or '.join(names)} is not set: {known[name].description}"
    message = message.removeprefix("Value error, ")
    return f"{told_as.get(name, name)}: {message[0].lower()}{message[1:]}"
