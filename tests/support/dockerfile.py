"""Dockerfiles, read and followed as far as that goes without a container engine."""

import re
import shlex
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAST = "worker"
"""How the last stage is called here, which has no name of its own."""


@dataclass(frozen=True)
class Step:
    """One instruction."""

    stage: str
    word: str
    rest: str

    @property
    def copied(self) -> tuple[list[str], str]:
        """Sources and target of a COPY."""
        *sources, target = shlex.split(self.rest)
        return sources, target


def read(text: str) -> list[Step]:
    """Its instructions, continued lines joined, comments left out."""
    lines = "\n".join(line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    steps: list[Step] = []
    stage = ""
    for line in re.sub(r"\s*\\\n\s*", " ", lines).splitlines():
        word, rest = line.split(" ", 1)
        if word == "FROM":
            stage = rest.partition(" AS ")[2] or LAST
        steps.append(Step(stage, word, rest))
    return steps


def is_sent(path: str, dockerfile: Path) -> bool:
    """Whether the builder is given it, by the few kinds of patterns that are in use: the last that fits decides."""
    sent = True
    for pattern in dockerfile.with_name(f"{dockerfile.name}.dockerignore").read_text().splitlines():
        wanted = pattern.removeprefix("!").removeprefix("**/")
        depth, folders = wanted.count("/"), [str(it) for it in (Path(path), *Path(path).parents)]
        found = path.split("/") if "**" in pattern else [it for it in folders if it.count("/") == depth]
        if any(fnmatch(it, wanted) for it in found):
            sent = pattern.startswith("!")
    return sent


def lay_out(steps: list[Step], stage: str, folder: Path) -> Path:
    """What the instructions of a stage copy, under the paths it has there."""
    at = Path("/")
    for it in steps:
        if it.stage != stage:
            continue
        if it.word == "WORKDIR":
            at = Path(it.rest)
        elif it.word == "COPY":
            sources, target = it.copied
            inside = folder / (at / target).relative_to("/")
            inside.mkdir(parents=True, exist_ok=True)  # every target here ends with a slash
            for source in map(ROOT.joinpath, sources):
                if source.is_dir():
                    shutil.copytree(source, inside, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
                else:
                    shutil.copy(source, inside)
    return folder / at.relative_to("/")


def from_the_context(steps: list[Step]) -> list[str]:
    """Every path that the build takes from the repository."""
    copied = [source for it in steps if it.word == "COPY" for source in it.copied[0]]
    return copied + re.findall(r"type=bind,source=([^,\s]+)", " ".join(it.rest for it in steps))


def environment(steps: list[Step]) -> dict[str, str]:
    """What ENV sets, with the defaults of ARG."""
    pairs = [pair for it in steps if it.word in {"ARG", "ENV"} for pair in shlex.split(it.rest)]
    values = dict(pair.split("=", 1) for pair in pairs)
    return {name: values.get(value.removeprefix("$"), value) for name, value in values.items()}


def overlooked_without_reason(dockerfile: Path) -> list[str]:
    """What the linter is told to overlook, where the line before does not say why."""
    lines = dockerfile.read_text().splitlines()
    return [
        line
        for before, line in pairwise(lines)
        if "hadolint ignore" in line and (not re.match(r"# \w+", before) or "hadolint" in before)
    ]
