"""Files of results that are whole at any moment."""

import os
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Writes a file so that whoever is killed meanwhile leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text)
    new.replace(path)
