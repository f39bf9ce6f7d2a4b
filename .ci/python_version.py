"""Refuses to build the project with a Python that is too old, before pip looks for its packages.

pip compares `requires-python` of a project with extras late. Until its version 23.1, which is what comes with Python
3.10, it first tries every version of every package of the extras: half an hour of silence. Before that it builds the
project, so the build is where to say it.
"""

import sys
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

OLDEST = (3, 11)
"""As `requires-python` in pyproject.toml."""


class PythonVersion(BuildHookInterface):
    """See `[tool.hatch.build.hooks.custom]` in pyproject.toml."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """As any build hook, before anything is built. Ends the process."""
        del version, build_data
        major, minor = sys.version_info[:2]
        if (major, minor) < OLDEST:
            sys.exit(f"serverless-i2v needs Python {OLDEST[0]}.{OLDEST[1]} or newer, and this is {major}.{minor}")
