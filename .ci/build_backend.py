"""Builds the project with hatchling, and refuses a Python that is too old before anything is fetched.

pip compares `requires-python` of a project with extras late. Versions before 23.1, such as the one that comes with
Python 3.10, first try every version of every package of the extras: half an hour of silence. Before that pip asks the
build backend what it needs, so a backend that needs nothing until it is asked can refuse in a second.
"""

import sys
from typing import Any

OLDEST = (3, 11)
"""As `requires-python` in pyproject.toml."""

if sys.version_info[:2] < OLDEST:
    HERE = ".".join(map(str, sys.version_info[:2]))
    sys.exit(f"serverless-i2v needs Python {OLDEST[0]}.{OLDEST[1]} or newer, and this is {HERE}")

HATCHLING = "hatchling>=1.27,<2"
EDITABLES = "editables>=0.5,<1"  # what hatchling needs for `pip install -e`


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """See PEP 517."""
    del config_settings
    return [HATCHLING]


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    """See PEP 517."""
    del config_settings
    return [HATCHLING]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """See PEP 660."""
    del config_settings
    return [HATCHLING, EDITABLES]


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """See PEP 517."""
    from hatchling import build  # noqa: PLC0415 - fetched when the above has been asked

    return build.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    """See PEP 517."""
    from hatchling import build  # noqa: PLC0415

    return build.build_sdist(sdist_directory, config_settings)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """See PEP 660."""
    from hatchling import build  # noqa: PLC0415

    return build.build_editable(wheel_directory, config_settings, metadata_directory)
