"""Benchmarks say what they lack before they start."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import needs
from tests.support.processes import environment

ROOT = Path(__file__).parent.parent

HIDDEN = """
import runpy, sys
sys.modules |= {"imageio": None, "torch": None}
sys.argv = ["wan", "--help"]
runpy.run_module("tests.bench.wan", run_name="__main__")
"""


def test_a_bench_that_lacks_packages_says_which():
    """And what installs them, instead of a traceback after an hour."""
    command = [sys.executable, "-c", HIDDEN]
    ran = subprocess.run(command, check=False, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert "torch, imageio not installed: pip install '.[bench,wan]'" in " ".join(ran.stderr.split())
    assert "Traceback" not in ran.stderr


def test_a_disk_that_is_too_small_is_known_before(tmp_path):
    """Weights are saved for what is measured last."""
    assert needs.room(tmp_path / "new", 0, "results") == []
    [told] = needs.room(tmp_path, 1e9, "models")
    assert "models need 1000000000.0; set TMPDIR" in told
    (tmp_path / "file").touch()
    [told] = needs.room(tmp_path / "file", 0, "results")
    assert "cannot be written" in told


def test_what_a_gpu_run_needs_is_known_before(tmp_path, monkeypatch):
    """A compiler for Triton, a device, and time for anything at all."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler, which torch.compile needs on a GPU: apt-get install gcc, or set CC" in needs.compiler()
    compiler = tmp_path / "gcc"
    compiler.touch(mode=0o755)
    assert not any("no C compiler" in line for line in needs.compiler())
    assert needs.time(600, 120) == []
    assert needs.time(60, 120) == ["a budget of 60 s, and the first comparison needs 120: raise --budget-s"]
    assert needs.gpu([], 40, "--shape tiny") == []


def test_a_machine_without_a_gpu_is_told_what_runs_there():
    """Instead of the true sizes."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    [told] = needs.gpu(["5b", "a14b-480p"], 40, "--shape tiny")
    assert told.startswith("5b, a14b-480p needs a CUDA device")
    assert told.endswith("finds none: --shape tiny does not")
