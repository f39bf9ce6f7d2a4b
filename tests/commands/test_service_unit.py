"""images/i2v-work.service: what systemd makes of it, and whether what it says of `i2v work` is so."""

import json
import re
import shlex
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from inference import process
from inference.commands import main as cli
from inference.leasing.taking import RELEASE_LIMIT_S
from inference.settings import Settings
from inference.settings_base import names_of
from tests.support.processes import I2V, i2v_here

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "images" / "i2v-work.service"
ANALYZE = shutil.which("systemd-analyze")
NEWER = {"RestartSteps", "RestartMaxDelaySec"}  # since systemd 254; older ones say so and go on
SETTINGS = {name: (field, info) for field, info in Settings.model_fields.items() for name in names_of(info)}
MAX_EXPOSURE = 2.5
"""Of 10, as systemd weighs it. What it takes from there is the GPU, compiled code and the network."""

needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not here")


def unit(section="Service"):
    """The directives of a section, each with all its values in order."""
    found, here = defaultdict(list), ""
    for line in UNIT.read_text().splitlines():
        if line.startswith("["):
            here = line.strip("[]")
        elif line and not line.startswith("#") and here == section:
            name, value = line.split("=", 1)
            found[name].append(value)
    return found


def one(name, section="Service"):
    """The only value of a directive."""
    [value] = unit(section)[name]
    return value


def environment():
    """Settings that the unit itself sets; what begins with PYTHON is the interpreter's."""
    given = dict(line.split("=", 1) for line in unit()["Environment"])
    return {name: value for name, value in given.items() if not name.startswith("PYTHON")}


def analyze(*arguments):
    """What systemd-analyze says, on either stream."""
    ran = subprocess.run([ANALYZE, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=30)
    return ran.returncode, ran.stdout + ran.stderr


def test_it_starts_a_command_that_there_is():
    """With options that it knows."""
    program, command, *options = shlex.split(one("ExecStart"))
    assert Path(program).is_absolute()
    known = cli.command(command)
    assert set(options) <= {option for parameter in known.params for option in parameter.opts}


def test_what_it_sets_are_settings_and_places_it_may_write_to():
    """Everything else is read-only there."""
    written = {f"/var/lib/{one('StateDirectory')}", f"/var/cache/{one('CacheDirectory')}"}
    Settings.isolated(**{SETTINGS[name][0]: value for name, value in environment().items()})
    paths = [value for value in environment().values() if value.startswith("/")]
    assert len(paths) == 2
    assert all(any(path.startswith(folder) for folder in written) for path in [*paths, one("WorkingDirectory")])


def test_it_waits_as_long_as_a_stop_takes():
    """The grace, and after it what hands back; SIGTERM is for the worker alone, which has ffmpeg finish."""
    assert float(one("TimeoutStopSec")) >= float(environment()["I2V_SHUTDOWN_GRACE"]) + 2 * RELEASE_LIMIT_S
    assert (one("KillSignal"), one("KillMode")) == ("SIGTERM", "mixed")


def test_a_worker_that_hangs_is_started_again():
    """It says oftener that it lives than systemd waits; a signal of which Python tells what it was doing ends it."""
    assert float(one("WatchdogSec")) >= 30 * process.TURN_S
    assert one("Type") == "exec"  # with which a watchdog listens to the main process alone
    assert "WatchdogSignal" not in unit()  # SIGABRT
    assert "PYTHONFAULTHANDLER=1" in unit()["Environment"]


def test_it_comes_back_after_what_may_pass_and_later_each_time():
    """However long an outage is."""
    assert (one("Restart"), one("StartLimitIntervalSec", "Unit")) == ("on-failure", "0")
    assert int(one("RestartSec")) < int(one("RestartMaxDelaySec"))
    assert int(one("RestartSteps")) > 1
    assert {"network-online.target", "comfyui.service"} <= set(one("After", "Unit").split())
    assert "comfyui.service" not in one("Wants", "Unit")  # it may be on another box, or under another name


@pytest.mark.parametrize(
    "options, settings, again",
    [
        ([], {}, False),
        ([], {"VERCEL_API_URL": "https://app.example.com"}, False),
        ([], {"VERCEL_API_URL": "http://127.0.0.1:1", "POLL_INTERVAL": "soon"}, False),
        (["--concurency", "2"], {}, False),
        (["--once"], {"VERCEL_API_URL": "http://127.0.0.1:1"}, True),
    ],
)
def test_wrong_settings_are_left_to_a_person(capsys, tmp_path, options, settings, again):
    """A queue that is away is not."""
    _, command, *own = shlex.split(one("ExecStart"))
    ran = i2v_here(capsys, tmp_path, command, *own, *options, WORKER_API_KEY="k", **settings)
    assert ran.returncode not in (0, None)
    assert (str(ran.returncode) not in one("RestartPreventExitStatus").split()) == again


def test_only_who_asks_gets_the_other_exit_code(capsys, tmp_path):
    """Scripts know 1 for every error."""
    assert i2v_here(capsys, tmp_path, "work").returncode == 1
    assert i2v_here(capsys, tmp_path, "work", "--supervised").returncode == process.WRONG_SETTINGS


@pytest.mark.parametrize(
    "name, value",
    [
        ("User", "i2v"),
        ("NoNewPrivileges", "yes"),
        ("CapabilityBoundingSet", ""),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "yes"),
        ("PrivateTmp", "yes"),
        ("RestrictNamespaces", "yes"),
        ("SystemCallFilter", "@system-service"),
        ("OOMPolicy", "continue"),
        ("EnvironmentFile", "/etc/serverless-i2v.env"),
    ],
)
def test_it_is_hardened(name, value):
    """What the worker does not need is taken away."""
    assert one(name) == value


@pytest.mark.parametrize("name", ["PrivateDevices", "ProtectClock", "MemoryDenyWriteExecute", "PrivateUsers"])
def test_what_a_gpu_needs_is_left_with_a_reason(name):
    """Whoever hardens it further reads first what that costs."""
    assert name not in unit()
    assert re.search(rf"^#   {name}=yes +\S", UNIT.read_text(), re.MULTILINE)


@needs_systemd
def test_systemd_takes_it(tmp_path):
    """With the command of this environment; the back-off may be too new for it."""
    here = tmp_path / UNIT.name
    here.write_text(UNIT.read_text().replace(shlex.split(one("ExecStart"))[0], str(I2V)))
    code, said = analyze("verify", here)
    ours = [line for line in said.splitlines() if UNIT.name in line]
    assert code == 0, said
    assert [line for line in ours if not any(f"Unknown key '{name}'" in line for name in NEWER)] == []


@needs_systemd
def test_systemd_finds_it_hardened():
    """By its own measure, as far as this version has one."""
    code, said = analyze("security", "--offline=yes", "--json=short", f"--threshold={MAX_EXPOSURE * 10:.0f}", UNIT)
    if "unrecognized option" in said:
        pytest.skip("systemd-analyze judges no files before systemd 250")
    assert code == 0, said
    judged = {it["json_field"]: it for it in json.loads(said[said.index("[{") : said.rindex("}]") + 2])}
    assert judged["ProtectSystem"]["exposure"] in (None, "0", 0)
