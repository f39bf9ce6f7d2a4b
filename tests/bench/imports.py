"""CPU seconds that each kind of process spends before it does anything, beside `import torch` alone.

    python -m tests.bench.imports                    all, three times each in turn; prints the least
    python -m tests.bench.imports --only engine      one of them, with the packages that cost most

CPU seconds are those of the whole process, user and system, from its start to its end, which other work on the machine
disturbs little. A package's own are by `python -X importtime`, which measures wall time: look at its order.
"""

import argparse
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PEER = "torch"

OPEN_DISPATCHER = """
import anyio
from inference.fleet.opening import open_dispatcher
from inference.on_modal.deployment import on_modal
from inference.payments.records import MemoryRecords
from inference.settings import Settings
async def main():
    settings = Settings.load(api_url="https://queue.example", api_key="key")
    async with open_dispatcher(settings, on_modal(settings), MemoryRecords(), {"gpu": None, "runway": None}):
        pass
anyio.run(main)
"""

HELP = "import sys; sys.argv[:] = ['i2v', *{words}, '--help']\nfrom inference.commands.main import main\nmain()"

PROGRAMS = {
    PEER: "import torch",
    "engine": "from inference.on_modal.deployment import import_engine; import_engine()",
    "modal": "import modal, modal.experimental",  # what app.py cannot do without
    "cron": "import app" + OPEN_DISPATCHER,
    "help": HELP.format(words=[]),
    "help of tasks": HELP.format(words=["tasks"]),
    "help of render": HELP.format(words=["render"]),
}


def cpu_s(program: str) -> float:
    """User and system time of a process that runs it."""
    environment = os.environ | {"MODAL_IS_REMOTE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return used.ru_utime + used.ru_stime


def packages(program: str) -> Counter[str]:
    """Wall seconds by package, its own modules alone."""
    command = [sys.executable, "-X", "importtime", "-c", program]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    found: Counter[str] = Counter()
    for line in told.splitlines():
        own, *_, name = line.removeprefix("import time:").split("|")
        if own.strip().isdecimal():
            found[name.strip().partition(".")[0]] += int(own) / 1e6
    return found


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=PROGRAMS)
    parser.add_argument("--times", type=int, default=3)
    asked = parser.parse_args()
    names = [PEER, asked.only] if asked.only else [*PROGRAMS]
    measured: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(asked.times):
        for name, times in measured.items():
            times.append(cpu_s(PROGRAMS[name]))
    for name, times in measured.items():
        print(f"{name:<16} {min(times):5.2f} CPU s   {min(times) / min(measured[PEER]):4.2f} of {PEER}")
    if asked.only:
        for name, seconds in packages(PROGRAMS[asked.only]).most_common(12):
            print(f"  {name:<20} {seconds:5.2f} s")


if __name__ == "__main__":
    main()
