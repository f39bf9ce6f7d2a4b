"""Every fence is load-bearing: take any one out, and a test must notice.

Lines marked `# fence` are found by themselves, so a new fence is covered from the start. Each is removed in a copy of
the tree, and the check that belongs to its module runs there, in a process of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# A mutant that hangs is noticed as well: the thread method of pytest-timeout ends the process.
PYTEST = (
    *(sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"),
    *("-p", "pytest_timeout", "--timeout", "10", "--timeout-method", "thread"),
    *("-p", "anyio.pytest_plugin"),
)
SIMULATION = (sys.executable, "-W", "ignore", "tests/simulation/leases.py", "--stop", "--seeds", "400")
CHECKS = {
    "inference/leasing/film.py": [(*PYTEST, "tests/leasing/test_film.py", "-k", "boundary")],
    "inference/leasing/keeper.py": [(*PYTEST, "tests/leasing/test_runner.py"), SIMULATION],
    "inference/leasing/executor.py": [
        (*PYTEST, "tests/leasing/test_executor.py"),
        (*PYTEST, "tests/fleet/test_warm_worker.py"),
    ],
    "inference/leasing/runner.py": [(*PYTEST, "tests/leasing/test_runner.py"), SIMULATION],
    "inference/leasing/retry.py": [(*PYTEST, "tests/leasing/test_runner.py"), SIMULATION],
    "inference/leasing/taking.py": [(*PYTEST, "tests/leasing/test_runner.py"), SIMULATION],
    "inference/engines/turns.py": [(*PYTEST, "tests/leasing/test_runner.py")],
    "inference/fleet/dispatch.py": [(*PYTEST, "tests/fleet/test_dispatch.py", "-k", "lease or refused or money")],
    "inference/fleet/warm_worker.py": [(*PYTEST, "tests/fleet/test_warm_worker.py")],
    "inference/testing/memory_store.py": [(*PYTEST, "tests/server/rows/test_store.py", "-k", "memory")],
    "inference/server/rows/removal.py": [(*PYTEST, "tests/server/rows/test_removal.py", "-k", "sqlite")],
    "inference/queues/video_jobs/statements.py": [
        (*PYTEST, "tests/queues/video_jobs/test_store.py", "-k", "ours"),
    ],
    "inference/server/rows/statements.py": [(*PYTEST, "tests/server/rows/test_store.py", "-k", "sqlite")],
    "inference/push/here.py": [(*PYTEST, "tests/push/test_app.py")],
    "inference/push/answers.py": [(*PYTEST, "tests/push/test_app.py")],
    "inference/push/auth.py": [(*PYTEST, "tests/push/test_app.py")],
    "inference/push/oidc.py": [(*PYTEST, "tests/push/test_oidc.py")],
    "inference/push/enqueue.py": [(*PYTEST, "tests/push/test_cloud_tasks.py")],
    "inference/on_modal/calls.py": [(*PYTEST, "tests/on_modal/test_calls.py")],
    "inference/on_modal/ticks.py": [(*PYTEST, "tests/on_modal/test_calls.py")],
}
"""What has to turn red when a fence of the module is taken out: one of these, quickest first."""


class Mutant(NamedTuple):
    """One change of one line."""

    path: str
    number: int  # from 1
    line: str
    replacement: str

    def __str__(self) -> str:
        return f"{self.path}:{self.number}: {self.line.split('#')[0].strip()}"


def fences() -> list[Mutant]:
    """Each marked line, taken out: an element of a list vanishes, a statement becomes `pass`."""
    found = []
    for path in sorted((ROOT / "inference").rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code, marked, _ = line.partition("  # fence")
            if marked and code.strip():
                indent = code[: len(code) - len(code.lstrip())]
                replacement = "" if code.endswith(",") else f"{indent}pass"
                found.append(Mutant(path.relative_to(ROOT).as_posix(), number, line, replacement))
    return found


def weakened() -> list[Mutant]:
    """Rules that are not a line of their own: made weaker instead of taken out."""
    changes = [
        ("inference/leasing/keeper.py", "WORK_SHARE = 2 / 3", "WORK_SHARE = 100"),
        ("inference/leasing/keeper.py", "wait_s = self._second_beat_s", "wait_s = self._interval_s"),
        ("inference/engines/turns.py", "async with self._free:", "if True:"),
        ("inference/engines/turns.py", "with anyio.move_on_after(self._limit_s):", "with anyio.move_on_after(1e9):"),
        (
            "inference/leasing/taking.py",
            "with anyio.CancelScope(shield=True), anyio.move_on_after(time_s):",
            "with anyio.move_on_after(time_s):",
        ),
        ("inference/push/answers.py", "found.attempt_id != attempt_id)", "found.attempt_id)"),
        ("inference/push/answers.py", 'case "failed" if found is None or found.has_ended:', 'case "failed":'),
        ("inference/push/answers.py", "http_status=200 if found.has_ended else 503,", "http_status=200,"),
        ("inference/push/auth.py", "if not secret and tokens is None:", "if False:"),
        ("inference/push/oidc.py", 'if claims.get("email_verified") is not True:', "if False:"),
        ("inference/push/oidc.py", "email.lower() not in self._callers:", "False:"),
        ("inference/push/oidc.py", "audience=self._audience,", "audience=None,"),
        ("inference/push/oidc.py", 'if claims.get("iss") not in ISSUERS:', "if False:"),
        ("inference/push/oidc.py", "except exceptions.TransportError as error:", "except KeyError as error:"),
        ("inference/push/oidc.py", "now + _age_s(kept.headers))", "now)"),
        ("inference/push/oidc.py", "AWAY_S = 5.0", "AWAY_S = -1.0"),
        ("inference/push/oidc.py", "token, limiter=self._threads)", "token)"),
        ("inference/push/here.py", "if self._free <= 0:", "if False:"),
        ("inference/on_modal/ticks.py", 'if not await records.add(ASKED, f"{time.time():.0f}"):', "if False:"),
        (
            "inference/queues/video_jobs/statements.py",
            "status=self._status(case((c.cancel_requested, CANCELED), else_=COMPLETED)),",
            "status=self._status(COMPLETED),",
        ),
        (
            "inference/queues/video_jobs/statements.py",
            "status=self._status(case((c.cancel_requested, CANCELED), else_=QUEUED)),",
            "status=self._status(QUEUED),",
        ),
    ]
    found = []
    for path, old, new in changes:
        lines = (ROOT / path).read_text().splitlines()
        [number] = [number for number, line in enumerate(lines, 1) if old in line]
        found.append(Mutant(path, number, lines[number - 1], lines[number - 1].replace(old, new)))
    return found


def test_every_module_with_fences_has_a_check():
    """And there are as many fences as the design has rules, or somebody lost some on the way."""
    assert {mutant.path for mutant in fences()} <= set(CHECKS)
    assert len(fences()) >= 20


def run(checks: list[tuple[str, ...]], tree: Path) -> subprocess.CompletedProcess[str]:
    """Runs checks in a copy of the tree, and only on the copy, until one fails."""
    # Plugins take longer to load than most checks take to run.
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    for check in checks:
        result = subprocess.run(
            check, cwd=tree, env=environment, capture_output=True, text=True, timeout=100, check=False
        )
        if result.returncode:
            break
    return result


@pytest.fixture
def tree(tmp_path):
    """A copy to mutate."""
    for name in ("inference", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "bench", "results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("mutant", fences() + weakened(), ids=str)
def test_taking_it_out_is_noticed(mutant, tree):
    """The check that passes on the tree as it is fails on the mutant, and not for want of valid Python."""
    path = tree / mutant.path
    lines = path.read_text().splitlines()
    assert lines[mutant.number - 1] == mutant.line
    lines[mutant.number - 1] = mutant.replacement
    path.write_text("\n".join(lines) + "\n")
    compile(path.read_text(), mutant.path, "exec")
    result = run(CHECKS[mutant.path], tree)
    said = result.stdout + result.stderr
    assert result.returncode == 1, f"nobody missed it:\n{said[-2000:]}"
    assert "ImportError" not in said
    assert "NameError" not in said


@pytest.mark.slow
@pytest.mark.parametrize("path", CHECKS)
def test_the_checks_pass_on_the_tree_as_it_is(path, tree):
    """A check that always fails would notice everything. The simulation is a test of its own."""
    result = run([check for check in CHECKS[path] if check is not SIMULATION], tree)
    assert result.returncode == 0, result.stdout[-2000:]
