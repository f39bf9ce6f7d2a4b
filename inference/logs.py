"""Logging: readable lines on a terminal, JSON lines everywhere else, and optionally a file."""

import json
import logging
import logging.handlers
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import structlog
from structlog.typing import EventDict, Processor

from inference import private
from inference.errors import is_legible, legible
from inference.progress.stages import Progress, Sink

log = structlog.get_logger(__name__)

LOG_FILE = "i2v.log"
LOG_FILE_BYTES = 10_000_000
LOG_FILES_KEPT = 5


def configure(level: str = "info", *, as_json: bool | None = None, log_dir: Path | None = None) -> None:
    """Sends all logging, ours and the libraries', to stderr and to `log_dir/i2v.log` if given.

    `as_json` None means: JSON unless stderr is a terminal. Raises OSError where the folder cannot be written.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    as_json = not sys.stderr.isatty() if as_json is None else as_json
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(_formatter(shared, as_json=as_json))
    handlers: list[logging.Handler] = [terminal]
    if log_dir:
        private.make_folder(log_dir, f"{LOG_FILE}*")
        for kept in log_dir.glob(f"{LOG_FILE}*"):
            private.close(kept)
        file = _PrivateFile(log_dir / LOG_FILE, maxBytes=LOG_FILE_BYTES, backupCount=LOG_FILES_KEPT, encoding="utf-8")
        file.setFormatter(_formatter(shared, as_json=True))
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
    """A log file that nobody else may read: prompts and storage paths are in it."""

    def _open(self) -> TextIOWrapper:
        private.make_file(Path(self.baseFilename))
        return super()._open()


def stages(item_id: str) -> Sink:
    """A sink that logs a line whenever a lease enters a stage."""
    last = ""

    def sink(progress: Progress) -> None:
        nonlocal last
        if progress.stage != last:
            last = progress.stage
            log.info("stage", item_id=item_id, stage=progress.stage)

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


def _formatter(shared: list[Processor], *, as_json: bool) -> structlog.stdlib.ProcessorFormatter:
    last: list[Processor] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.processors.format_exc_info,
    ]
    if as_json:
        last += [structlog.processors.JSONRenderer(ensure_ascii=False), _escaped]
    else:
        last += [_legible_values, _FOR_PEOPLE]
    return structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=last)
