"""The project as pip builds it: refused at once with a Python that is too old, described by names that are known."""

import sys
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.specifiers import SpecifierSet
from trove_classifiers import classifiers

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def python_versions() -> list[str]:
    """Of the classifiers: 3.11 and later."""
    named = [each.rpartition(" :: ")[2] for each in PROJECT["classifiers"] if ":: Python :: 3." in each]
    assert named
    return named


@pytest.mark.parametrize("version", [(3, 9, 1), (3, 10, 13)])
def test_an_old_python_is_refused_before_pip_looks_for_packages(monkeypatch, tmp_path, version):
    """While the wheel is built, which is the first that pip does with a folder."""
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(SystemExit, match=rf"needs Python 3\.11 or newer, and this is 3\.{version[1]}$"):
        next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path)))
    assert not list(tmp_path.glob("*.whl"))


def test_what_is_refused_is_what_is_not_supported():
    """The hook and `requires-python` name the same version."""
    spec = spec_from_file_location(
        "python_version", ROOT / PYPROJECT["tool"]["hatch"]["build"]["hooks"]["custom"]["path"]
    )
    hook = module_from_spec(spec)
    spec.loader.exec_module(hook)
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(f">={hook.OLDEST[0]}.{hook.OLDEST[1]}")


def test_classifiers_are_known_and_say_what_was_run():
    """Every version named is one that CONTRIBUTING.md has a run of."""
    assert set(PROJECT["classifiers"]) <= classifiers
    told = (ROOT / "CONTRIBUTING.md").read_text()
    for version in python_versions():
        assert SpecifierSet(PROJECT["requires-python"]).contains(version)
        assert f"\n| {version}" in told
