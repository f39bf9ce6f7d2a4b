"""Text of strangers on a terminal: it is shown, and obeyed by nobody."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from rich.console import Console

from inference import terminal
from inference.errors import legible, one_line
from inference.progress.stages import Progress

HOSTILE = "a\x1b]0;title\x07b\x9b2Jc\u202ed\u2066e\x00f\x7fg\ud800h\u2028i"
"""An escape, a C1 code, two marks of direction, NUL, DEL, half a surrogate, a line separator."""

NAME = "[bold]휴가[/b] [/]👨\u200d👩\u200d👧"
"""Markup in two ways: an opened tag vanishes, one that was never opened is a traceback."""

ORDERS = re.compile(
    "[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]|\x1b(?!\\[)"
)
"""What no line may hold; a terminal's own colours begin with ESC [."""


def on_a_terminal(program, columns=300):
    """What a program that uses `terminal` shows, on a terminal; and with its output in a file."""
    command = [sys.executable, "-c", f"from inference import logs, terminal\n{program}"]
    main, end = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm"}
    with subprocess.Popen(command, stdout=end, stderr=end, env=environment) as running:
        os.close(end)
        said = b""
        while chunk := _read(main):
            said += chunk
    os.close(main)
    assert running.returncode == 0, said
    return said.decode()


def _read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux says so when the other end is closed
        return b""


def test_what_is_legible_stays():
    """Korean, emoji of several parts, accents, and blanks of other widths; the rest is one sign each."""
    for text in ("천천히 줌인", NAME, "👍🏽 🏴 ❤️", "naïve — “quoted”", "क्\u200dष", "wide\u3000blank"):
        assert legible(text) == text
    assert legible(HOSTILE) == "a�]0;title�b�2Jc�d�e�f�g�h�i"
    assert one_line(f"  👨\u200d👩\n{HOSTILE}", 100) == "👨\u200d👩 a ]0;title b 2Jc d e f g h i"


TASK = {
    "id": HOSTILE,
    "status": "failed",
    "prompt": f"{NAME} {HOSTILE}",
    "error_message": f"{HOSTILE} {NAME}",
    "seconds": 5,
    "created_at": datetime.now(UTC).isoformat(),
}

LOGGED = f"""
import structlog
logs.configure("info")
structlog.get_logger().info("lease_started", prompt={NAME + HOSTILE!r})
"""

RAISED = f"""
import structlog
from inference.errors import InvalidTask
logs.configure("info")
try:
    raise InvalidTask({NAME + HOSTILE!r})
except InvalidTask as error:
    structlog.get_logger().error("unexpected_error", exc_info=error)
"""

VERBOSE = f"""
from inference.errors import InvalidTask
from inference.process import told_errors
try:
    with told_errors(verbose=True):
        raise InvalidTask({NAME + HOSTILE!r})
except SystemExit:
    pass
"""

WORKING = f"""
from inference.progress.stages import Progress
with terminal.bar({NAME!r}) as sink:
    sink(Progress(stage={HOSTILE + NAME!r}, done=0, total=1, fraction=0))
"""


@pytest.mark.parametrize(
    "program",
    [
        f"terminal.show_tasks([{TASK!r}])",
        f"with terminal.watched_tasks() as show: show([{TASK!r}], {HOSTILE + NAME!r})",
        f"terminal.finding('queue', 'FAIL', {HOSTILE + NAME!r})",
        f"terminal.say({NAME + HOSTILE!r})",
        f"terminal.error({NAME + HOSTILE!r})",
        f"terminal.completed({NAME + HOSTILE!r})",
        f"terminal.result({NAME + HOSTILE!r})",
        WORKING,
        LOGGED,
        RAISED,
        VERBOSE,
    ],
)
def test_nothing_a_stranger_wrote_is_obeyed(program):
    """In tables, findings, lines, results, stages, logs, and errors with and without their traceback."""
    said = on_a_terminal(program)
    assert not [line for line in said.replace("\r", "").split("\n") if ORDERS.search(line)]
    assert "[bold]휴가[/b] [/]👨" in said  # a log's line has the rest of the family escaped


def test_a_narrow_terminal_shows_whole_ids():
    """They are copied from the table; what does not fit is the rest of a prompt."""
    task = {
        "id": "01a224bb-2aad-78f7-b746-7aa16abb865d",
        "status": "processing",
        "progress": {"fraction": 0.55},
        "prompt": "a slow dolly-in over the garden",
        "error_message": None,
        "seconds": 5,
        "created_at": datetime.now(UTC).isoformat(),
    }
    said = on_a_terminal(f"terminal.show_tasks([{task!r}])", columns=80)
    head, row = re.sub("\x1b\\[[0-9;]*m", "", said).splitlines()
    assert head.split() == ["task", "status", "age", "seconds", "prompt"]
    assert row.split()[:3] == [task["id"], "processing", "55%"]
    assert re.search(r" 5 +a slow.*…$", row.rstrip())


WORKING_ON = {
    "id": "01a224bb-2aad-78f7-b746-7aa16abb865d",
    "status": "processing",
    "progress": {"fraction": 0.29, "stage": "denoise"},
    "eta_s": 95.2,
    "cost_usd": None,
    "photo_filename": "holiday.jpg",
    "prompt": "a slow dolly-in over the garden",
    "error_message": None,
    "seconds": 5,
    "created_at": datetime.now(UTC).isoformat(),
}
COMPLETED = WORKING_ON | {
    "id": "01a224bb-2aad-78f7-b746-7aa16abb865e",
    "status": "completed",
    "progress": {"fraction": 1, "stage": "done"},
    "eta_s": None,
    "cost_usd": 0.004321,
}
FAILED = COMPLETED | {"id": "01a224bb-2aad-78f7-b746-7aa16abb865f", "status": "failed", "cost_usd": None}
FAILED |= {"error_message": "the photo is damaged: send it again"}


def plain(said):
    """Lines without colours."""
    return [line.rstrip() for line in re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", said).replace("\r", "").split("\n")]


def screen(monkeypatch, columns):
    """What is shown on a terminal of so many columns and 25 lines, in this process, which spares the start of one."""
    shown = io.StringIO()
    console = Console(
        file=shown, force_terminal=True, width=columns, height=25, highlight=False, soft_wrap=True, legacy_windows=False
    )
    monkeypatch.setattr(terminal, "out", console)
    return shown


@pytest.mark.parametrize(
    "columns, title",
    [
        (200, "task status stage left price age seconds photo prompt"),
        (100, "task status left price photo prompt"),
        (80, "task status left price photo"),
    ],
)
def test_what_is_known_of_tasks_has_columns(monkeypatch, columns, title):
    """Photo, time left and price before all else; the least important go first, and ids stay whole."""
    shown = screen(monkeypatch, columns)
    terminal.show_tasks([WORKING_ON, COMPLETED, FAILED])
    head, first, second, third, *_ = plain(shown.getvalue())
    assert head.split() == title.split()
    for line, task in ((first, WORKING_ON), (second, COMPLETED), (third, FAILED)):
        assert line.startswith(task["id"])
        assert len(line) <= columns
    assert "processing 29%" in first
    assert ("2 min" in first) == ("left" in title)
    assert ("denoise" in first) == ("stage" in title)
    assert ("$0.0043" in second) == ("price" in title)
    assert "done" not in second
    assert "holiday.j" in third


LINES = {
    36: "  processing 29%  2 min left  할머 …",
    40: "  processing 29%  2 min left  할머니와 …",
    50: "  processing 29%  2 min left  할머니와 함께.jpg",
}


@pytest.mark.parametrize("columns", [36, 40, 50])
def test_an_id_that_takes_the_line_has_the_rest_below(monkeypatch, columns):
    """Photo, price and time left on the narrowest terminals, and no line that wraps."""
    shown = screen(monkeypatch, columns)
    terminal.show_tasks([WORKING_ON | {"photo_filename": "할머니와 함께.jpg"}, COMPLETED])
    assert plain(shown.getvalue())[:4] == [
        WORKING_ON["id"],
        LINES[columns],
        COMPLETED["id"],
        "  completed  $0.0043  holiday.jpg",
    ]


@pytest.mark.parametrize("columns", [30, 60, 130])
def test_tasks_are_watched_in_place(monkeypatch, columns):
    """On a narrow terminal ids are cut to their ends, lines never wrap, and errors stand where the prompt was."""
    shown = screen(monkeypatch, columns)
    with terminal.watched_tasks() as show:
        show([], "")
        assert plain(shown.getvalue())[0] == "No tasks."
        show([WORKING_ON] * 100, "1 in work")
        assert "1 in work  (and 79 more)" in plain(shown.getvalue())
        show([COMPLETED, FAILED], "none in work")
    head, first, second, summary, _ = plain(shown.getvalue().rpartition("\x1b[2K")[2])
    assert head.split()[:2] == ["task", "status"]
    assert first.split()[:2] == [COMPLETED["id"] if columns == 130 else "6abb865e", "completed"]
    assert "the ph" in second
    assert summary == "none in work"
    assert max(map(len, (head, first, second))) <= columns


def test_the_line_about_all_tasks_is_whole_on_a_narrow_terminal(monkeypatch):
    """It goes on below, and the table leaves it the room."""
    shown, summary = screen(monkeypatch, 30), "12 waiting (for up to 20 min), 1 in work, all done in 3 h; 2 workers"
    with terminal.watched_tasks() as show:
        show([WORKING_ON] * 100, summary)
        lines = plain(shown.getvalue())
    said = lines[lines.index("12 waiting (for up to 20 min),") :]
    assert " ".join(" ".join(said).split()) == f"{summary} (and 80 more)"
    assert len(lines) <= 25


def test_changes_are_lines_where_there_is_no_terminal(capfd):
    """One for each status and stage, the oldest task first; what stays as it was is not said again."""
    decoding = WORKING_ON | {"progress": {"fraction": 0.9, "stage": "decode"}}
    done = WORKING_ON | {"status": "completed", "cost_usd": 0.25}
    with terminal.watched_tasks() as show:
        for tasks in ([WORKING_ON, FAILED], [WORKING_ON], [decoding], [decoding | {"eta_s": 1}], [done], [done]):
            show(tasks, "a summary")
    one = WORKING_ON["id"]
    assert capfd.readouterr().out.splitlines() == [
        f"{FAILED['id']}  failed  the photo is damaged: send it again",
        f"{one}  processing 29%  denoise",
        f"{one}  processing 90%  decode",
        f"{one}  completed  $0.25",
    ]


def test_a_bar_has_the_time_that_is_left():
    """As whoever works on it says."""
    program = """
from inference.progress.stages import Progress
with terminal.bar("task") as sink:
    sink(Progress(stage="denoise", done=3, total=10, fraction=0.3, eta_s=123.4))
"""
    said = " ".join(plain(on_a_terminal(program)))
    assert re.search(r"task .* 30 % denoise 3/10 .*left 2 min", said)


def test_a_bar_that_has_waited_does_not_guess():
    """Where nobody says how much time is left, the speed of the stage does, and not the time before it began."""
    program = """
from inference.progress.stages import Progress
with terminal.bar("task") as sink:
    for at_s, stage, fraction in (0, "pending", 0), (600, "render", 0.1), (605, "render", 0.3), (610, "render", 0.5):
        terminal.time.monotonic = lambda: at_s
        sink(Progress(stage=stage, done=0, total=1, fraction=fraction))
        terminal.say(f"seen {stage} {fraction}")
"""
    said = " ".join(plain(on_a_terminal(program)))
    before, _, after = said.partition("seen render 0.1")
    assert "left" not in before
    assert re.search(r"50 % render .*left 1[23] s", after), after


def test_a_program_reads_results_as_they_are():
    """A path may hold anything but NUL; and JSON that means the same is legible."""
    path = os.fsdecode(b"/tmp/[bold]\x1b[31m\xff.mp4")
    task = {"prompt": HOSTILE + NAME}
    program = f"""
import json
from inference import terminal
terminal.result({path!r})
terminal.json_line(json.dumps({task!r}, ensure_ascii=False))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    first, second = ran.stdout.splitlines()
    assert first == os.fsencode(path)
    assert json.loads(second) == task
    assert not ORDERS.search(second.decode())
    assert "휴가" in second.decode()


BREAKS = """
from inference import process, terminal

async def main():
    while True:
        {line}

with process.told_errors(verbose=False):
    process.run(main)
"""


@pytest.mark.parametrize("line", ["terminal.json_line('{}')", "terminal.result('a.mp4')", "terminal.show_tasks([])"])
def test_a_reader_that_has_enough_ends_a_command_in_silence(line):
    """As `i2v tasks --json | head -1` does."""
    reads, writes = os.pipe()
    os.close(reads)
    program = [sys.executable, "-c", BREAKS.format(line=line)]
    ran = subprocess.run(program, stdout=writes, stderr=subprocess.PIPE, check=False, timeout=20)
    os.close(writes)
    assert (ran.returncode, ran.stderr.decode()) == (1, "")


@pytest.mark.parametrize("stage", [NAME, "[/red]"])
def test_stages_where_nobody_watches(capsys, stage):
    """A line each, as they are named."""
    with terminal.bar("[x]") as sink:
        sink(Progress(stage=stage, done=0, total=1, fraction=0))
    assert capsys.readouterr().err == f"  [x]: {stage}\n"
