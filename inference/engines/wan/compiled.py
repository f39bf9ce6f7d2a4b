"""Code that was compiled before anybody waits for it: where it is kept, and whether it belongs to this machine.

    compiled/a14b-fast.0f3c….bin    a line of JSON, what it was compiled for and a digest; then what the compiler saved
    compiled/a14b-fast.failed       why a build has none, in one line

The compiler asks its cache only when a graph is there, and compiles for minutes what it does not find. So what it was
compiled for is compared first: the GPU, the versions of the libraries, the switches and the code that is traced. Files
are written and renamed, so others read a whole one or none, however many compile at once. Whoever may write here can
run code in a worker, as with any Python file: the saved cache is a pickle.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from inference.errors import one_line

TRACED = ("presets.py", "speed.py", "tokens.py", "warming.py", "compiled.py", "compiler.py")
"""Modules of ours on which it depends what graphs there are: their code, types and shapes; and, the last two, whether
they are found again. What else is traced is diffusers' and torch's, with versions."""

MAX_REASON_CHARS = 300


@dataclass(frozen=True, slots=True)
class Found:
    """What there is for a machine: `artifacts`, or one line that says why there are none."""

    artifacts: bytes | None
    why: str = ""
    surprising: bool = False  # somebody wanted it to be there


def traced_code() -> str:
    """A digest of the modules in TRACED."""
    digest = hashlib.sha256()
    for name in TRACED:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:12]


def find(folder: Path, preset: str, facts: Mapping[str, str]) -> Found:
    """What was compiled for exactly `facts`, whole and undamaged."""
    path = folder / _name(preset, facts)
    try:
        with path.open("rb") as file:
            described, artifacts = json.loads(file.readline()), file.read()
    except FileNotFoundError:
        return _why_not(folder, preset, facts)
    except (OSError, ValueError) as error:
        return Found(None, f"{path} cannot be read: {error}", surprising=True)
    if not isinstance(described, dict) or described.get("sha256") != hashlib.sha256(artifacts).hexdigest():
        return Found(None, f"{path} is damaged", surprising=True)
    return Found(artifacts)


def keep(folder: Path, preset: str, facts: Mapping[str, str], artifacts: bytes) -> Path:
    """Keeps `artifacts` for other processes. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _name(preset, facts)
    described = {"sha256": hashlib.sha256(artifacts).hexdigest(), "facts": dict(facts)}
    _write(path, json.dumps(described).encode() + b"\n" + artifacts)
    (folder / f"{preset}.failed").unlink(missing_ok=True)
    return path


def tell_failed(folder: Path, preset: str, why: str) -> None:
    """Leaves a note why a build has nothing compiled, which `find` tells. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{preset}.failed", why.encode())


def _write(path: Path, content: bytes) -> None:
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # containers that share a volume share process ids
    try:
        new.write_bytes(content)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _name(preset: str, facts: Mapping[str, str]) -> str:
    return f"{preset}.{hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:12]}.bin"


def _why_not(folder: Path, preset: str, facts: Mapping[str, str]) -> Found:
    """Of what was compiled for something else, what is nearest, and in what it differs."""
    try:
        failed = (folder / f"{preset}.failed").read_text(errors="replace")
    except OSError:
        failed = ""
    if failed:
        return Found(None, f"compiling it ahead failed: {one_line(failed, MAX_REASON_CHARS)}", surprising=True)
    others = [other for path in sorted(folder.glob(f"{preset}.*.bin")) if (other := _facts_in(path))]
    if not others:
        return Found(None, f"nothing was compiled ahead in {folder}")
    differences = [_differences(other, facts) for other in others]
    nearest: list[str] = min(differences, key=len)
    return Found(None, f"what {folder} has was compiled for {'; '.join(nearest)}", surprising=True)


def _differences(other: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    names = [name for name in sorted({*other, *here}) if other.get(name) != here.get(name)]
    return [f"{name} {other.get(name, '?')}, which is {here.get(name, '?')} here" for name in names]


def _facts_in(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            described = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    facts = described.get("facts") if isinstance(described, dict) else None
    return facts if isinstance(facts, dict) else {}
