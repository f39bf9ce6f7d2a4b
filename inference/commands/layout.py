"""How help is laid out, on terminals of any width. Imports nothing but the standard library: `i2v --help` needs it."""

import shutil
from typing import Any, Literal

TABLES_FROM = 80
"""Cells that a terminal has to have for help in tables: in fewer, those would cut the names of options."""

WIDTH = max(shutil.get_terminal_size().columns, 32)

MARKUP: Literal["markdown"] | None = "markdown" if WIDTH >= TABLES_FROM else None
"""How help is laid out: in tables, or in plain paragraphs, which fit any terminal."""

HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"]} | ({} if MARKUP else {"terminal_width": WIDTH - 2})
"""For the commands' context. Click itself writes no lines of less than 50 cells unless it is told the width."""
