"""Logging: readable lines on a terminal, JSON lines everywhere else, and optionally a file.

console   columns and colours, for a terminal
json      one object a line, for programs
human     one sentence a line, with the steps of a task as the documents of the workers number them
"""

import itertools
import json
import logging
import logging.handlers
import os
import sys
import time
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal

import structlog
from structlog.typing import EventDict, Processor

from inference import private
from inference.errors import is_legible, legible
from inference.progress.events import percent
from inference.progress.stages import Progress, Sink

log = structlog.get_logger(__name__)

LOG_FILE = "i2v"
"""What the name of every log file begins with."""

LOG_FILE_BYTES = 10_000_000
LOG_FILES_KEPT = 5


Format = Literal["console", "json", "human"]


def configure(
    level: str = "info", *, log_format: Format | None = None, log_dir: Path | None = None, worker_id: str | None = None
) -> None:
    """Sends all logging, ours and the libraries', to stderr and, if given, to a file in `log_dir`.

    `log_format` None means: JSON, but `console` on a terminal. A file is JSON unless `human` is asked for.
    `worker_id`: whose log it is; the file is `i2v-ID.log`, and `i2v.log` without. A process that runs beside another of
    the same name writes `i2v-ID.2.log`, so that no two turn over one file. Raises OSError where it cannot be written.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    on_stderr = log_format or ("console" if sys.stderr.isatty() else "json")
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(_formatter(shared, on_stderr, worker_id))
    handlers: list[logging.Handler] = [terminal]
    if log_dir:
        private.make_folder(log_dir, f"{LOG_FILE}*.log*")
        for kept in log_dir.glob(f"{LOG_FILE}*.log*"):
            private.close(kept)
        for before in logging.getLogger().handlers:  # of this process, which would be in its own way
            if isinstance(before, _PrivateFile):
                before.close()
        file = _PrivateFile.claimed(log_dir, f"{LOG_FILE}-{worker_id}" if worker_id else LOG_FILE)
        file.setFormatter(_formatter(shared, "human" if log_format == "human" else "json", worker_id))
        handlers.append(file)
    logging.basicConfig(handlers=handlers, level=level.upper(), force=True)
    # httpx logs whole URLs at INFO, and httpcore at DEBUG: presigned ones carry credentials in the query.
    # uvicorn logs four lines at each start and stop; our own line has the address of the queue.
    for name in ("httpx", "httpcore", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


class _PrivateFile(logging.handlers.RotatingFileHandler):
    """A log file of this process that nobody else may read: prompts and storage paths are in it."""

    _lock: int | None = None
    _fault = ""  # why the last line was not written

    @classmethod
    def claimed(cls, folder: Path, name: str) -> "_PrivateFile":
        """The first of `name.log`, `name.2.log`, … that no other process writes to.

        What is locked is a file beside it: the log itself is another file each time it is turned over. Where there are
        no locks it is the first, whoever else writes to it.
        """
        for number in itertools.count(1):
            path = folder / (f"{name}.log" if number == 1 else f"{name}.{number}.log")
            beside = path.with_name(f"{path.name}.lock")
            private.make_file(beside)
            lock, has_locks = None, sys.platform != "win32"
            try:
                lock = private.hold(beside)
            except OSError:
                has_locks = False
            if lock is not None or not has_locks:
                file = cls(path, maxBytes=LOG_FILE_BYTES, backupCount=LOG_FILES_KEPT, encoding="utf-8")
                file._lock = lock
                return file
        raise AssertionError  # mypy does not know that the loop has no end

    def _open(self) -> TextIOWrapper:
        private.make_file(Path(self.baseFilename))
        return super()._open()

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line. A disk that takes none is told on stderr, once until it takes one again."""
        before, self._fault = self._fault, ""
        super().emit(record)
        if self._fault and not before:
            log.warning("log_file_not_written", error=self._fault, path=self.baseFilename)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - see logging
        """Where a line could not be written. The same lines are on stderr, which a traceback for each would bury."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._fault = str(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        """Also lets others have the file."""
        super().close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


QUIET_S = 30.0
"""A stage that goes on for longer than this says how far it is."""


def stages(item_id: str) -> Sink:
    """A sink that logs a line whenever a lease enters a stage, and in a long one now and then."""
    stage, told_s = "", 0.0

    def sink(progress: Progress) -> None:
        nonlocal stage, told_s
        now_s = time.monotonic()
        if progress.stage != stage:
            stage, told_s = progress.stage, now_s
            log.info("stage", item_id=item_id, stage=stage, percent=percent(progress.fraction))
        elif now_s - told_s >= QUIET_S:
            told_s = now_s
            left = {} if progress.eta_s is None else {"left_s": round(progress.eta_s)}
            log.info("progress", item_id=item_id, stage=stage, percent=percent(progress.fraction), **left)

    return sink


# Plain tracebacks: structlog's pretty ones print local variables, which may hold keys and presigned URLs.
_FOR_PEOPLE = structlog.dev.ConsoleRenderer(
    colors=True, pad_event_to=20, exception_formatter=structlog.dev.plain_traceback
)


def json_escaped(text: str) -> str:
    """Equivalent JSON in which characters that are not legible are escaped; other text stays readable."""
    return "".join(character if is_legible(character) else json.dumps(character)[1:-1] for character in text)


def _escaped(_logger: Any, _method: str, line: Any) -> str:
    return json_escaped(str(line))


def _legible_values(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Makes untrusted text in a log line legible. Other values are logged by their repr, which escapes."""
    for name, value in event.items():
        if isinstance(value, str):
            lines = value.split("\n") if name in {"exception", "stack"} else [value]
            event[name] = "\n".join(map(legible, lines))
    return event


def _formatter(
    shared: list[Processor], log_format: Format, worker_id: str | None
) -> structlog.stdlib.ProcessorFormatter:
    last: list[Processor] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.processors.format_exc_info,
    ]
    match log_format:
        case "json":
            last += [structlog.processors.JSONRenderer(ensure_ascii=False), _escaped]
        case "console":
            last += [_legible_values, _FOR_PEOPLE]
        case "human":
            last += [_legible_values, _Sentences(worker_id)]
    return structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=last)


SENTENCES: dict[str, str] = {
    "worker_started": "Worker started, engine {engine}, queue {queue}",
    "lease_started": "Task started: {item_id}",
    "stage download": "[STEP 1/6] Asking where the photo is",
    "presigned download": "[STEP 2/6] Downloading the photo",
    "stage wait": "Waiting for the engine",
    "stage": "[STEP 3/6] Making the video: {stage}",
    "stage upload": "[STEP 4/6] Asking where the video goes",
    "presigned upload": "[STEP 5/6] Uploading the video",
    "stage report": "[STEP 6/6] Reporting the video",
    "stage done": "Reported",
    "lease_ended completed": "Task complete: {item_id} (SUCCESS)",
    "lease_ended failed": "Task complete: {item_id} (FAILED): {error}",
    "lease_ended": "Task ended here: {item_id} ({status}): {error}",
    "idle": "[IDLE] No task: {polls} questions since the last line",
    "stopping": "Stopping",
    "worker_stopped": "Worker stopped",
}
"""What events mean, by event and what kind of it. The six steps are those of the document of the Runway worker."""

KINDS = ("stage", "operation", "status")
"""Fields that say what kind of an event it is."""


class _Sentences:
    """Renders `2026-01-05 12:00:00 [INFO] [worker] sentence name=value …`; the time is UTC."""

    def __init__(self, worker_id: str | None) -> None:
        self._whose = f" [{worker_id}]" if worker_id else ""

    def __call__(self, _logger: Any, _method: str, event: EventDict) -> str:
        name, level = str(event.pop("event")), str(event.pop("level", "info")).upper()
        at = str(event.pop("timestamp", ""))[:19].replace("T", " ")
        traceback = [str(event.pop(field)) for field in ("stack", "exception") if field in event]
        kind = next((str(event[field]) for field in KINDS if field in event), "")
        sentence = SENTENCES.get(f"{name} {kind}", SENTENCES.get(name))
        told = name
        if sentence is not None:
            told = sentence.format_map(_Fields(event))
            said = {"worker_id", *KINDS}
            event = {
                field: value for field, value in event.items() if field not in said and f"{{{field}}}" not in sentence
            }
        rest = "".join(f" {field}={_value(value)}" for field, value in event.items())
        return "\n".join([f"{at} [{level}]{self._whose} {told}{rest}", *traceback])


class _Fields(dict[str, Any]):
    """Fields of an event, some of which may be missing."""

    def __missing__(self, _name: str) -> str:
        return "-"


def _value(value: object) -> str:
    """A field's value in a line. Text with blanks is quoted, so that one sees where it ends."""
    if isinstance(value, dict):
        return ",".join(f"{name}:{_value(each)}" for name, each in value.items())
    text = str(value) if isinstance(value, str | int | float | bool) else legible(repr(value))
    return f'"{text}"' if " " in text else text
