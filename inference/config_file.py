"""A file of settings in YAML: one `name: value` a line, in which `${NAME}` stands for a variable of the environment.

The document of the Runway worker has such a file, with secrets in the environment and the rest beside them.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from inference.errors import SettingsError

VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def read(path: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """What the file says, as a variable of the environment would say it, by the file's names.

    Names without a value are left out, and those whose value is a variable that is not set.
    `environment`: variables by their names in capitals.
    Raises SettingsError where the file cannot be read, or says anything else than names and values.
    """
    try:
        import yaml  # noqa: PLC0415 - an extra
    except ImportError:
        raise SettingsError("--config needs an extra: pip install 'serverless-i2v[yaml]'") from None
    try:
        # Every value stays the text that it is: YAML's own types would make another key of a key of digits alone.
        said = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # noqa: S506 - makes text only
    except OSError as error:
        raise SettingsError(f"--config: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"--config: {path} is not UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # the error's own text would show the line, and a key that is in it
        where = f", line {mark.line + 1}" if mark else ""
        raise SettingsError(f"--config: {path}{where} is not YAML") from None
    if not said:
        return {}
    if not isinstance(said, dict):
        raise SettingsError(f"--config: {path} has to have lines such as `worker_id: runway-worker-001`")
    values = {str(name): _value(path, str(name), value, environment) for name, value in said.items()}
    return {name: value for name, value in values.items() if value}


def _value(path: Path, name: str, value: object, environment: Mapping[str, str]) -> str:
    if not isinstance(value, str):
        raise SettingsError(f"--config: {path}: {name} has to have one value, not a list or names of its own")
    if value.lower() in {"~", "null"}:
        return ""
    missing = [each for each in VARIABLE.findall(value) if each.upper() not in environment]
    if missing and not VARIABLE.fullmatch(value):
        raise SettingsError(f"--config: {path}: {name} needs {', '.join(missing)}, which the environment does not have")
    return VARIABLE.sub(lambda found: environment.get(found[1].upper(), ""), value)
