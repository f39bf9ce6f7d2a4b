"""The project as pip builds it: refused at once with a Python that is too old, described by names that are known."""

import sys
import tomllib
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
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


def backend():
    """The build backend, imported anew."""
    spec = spec_from_file_location("build_backend", ROOT / ".ci" / "build_backend.py")
    spec.loader.exec_module(found := module_from_spec(spec))
    return found


@pytest.mark.parametrize("version", [(3, 9, 1), (3, 10, 13)])
def test_an_old_python_is_refused_before_anything_is_fetched(monkeypatch, version):
    """When the backend is imported, of which pip then asks what it needs: nothing until then."""
    assert PYPROJECT["build-system"] == {"requires": [], "build-backend": "build_backend", "backend-path": [".ci"]}
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(SystemExit, match=rf"needs Python 3\.11 or newer, and this is 3\.{version[1]}$"):
        backend()


def test_what_is_refused_is_what_is_not_supported():
    """The backend and `requires-python` name the same version."""
    major, minor = backend().OLDEST
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(f">={major}.{minor}")


def test_the_backend_needs_what_the_tests_have():
    """The same range in both."""
    assert backend().get_requires_for_build_wheel()[0] in PROJECT["optional-dependencies"]["test"]


def test_a_wheel_has_the_package_alone(tmp_path):
    """Built as pip does it, from the tree."""
    wheel = tmp_path / backend().build_wheel(str(tmp_path))
    names = zipfile.ZipFile(wheel).namelist()
    assert "inference/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"inference", f"serverless_i2v-{PROJECT['version']}.dist-info"}


def test_classifiers_are_known_and_say_what_was_run():
    """Every version named is one that CONTRIBUTING.md has a run of."""
    assert set(PROJECT["classifiers"]) <= classifiers
    told = (ROOT / "CONTRIBUTING.md").read_text()
    for version in python_versions():
        assert SpecifierSet(PROJECT["requires-python"]).contains(version)
        assert f"\n| {version}" in told
