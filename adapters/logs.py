"""Log lines of a process: JSON for programs, or columns for people."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

LogFormat = Literal["auto", "console", "json"]
"""auto: console on a terminal, JSON otherwise."""

# The fields of a record that are written, besides its message. Libraries may add others.
_FIELDS = (
    "method",
    "route",
    "status",
    "seconds",
    "bytes_in",
    "bytes_out",
    "tenant",
    "adapter",
    "key",
    "request_id",
)
# These libraries set up their loggers themselves.
_LIBRARIES = ("bentoml", "circus", "uvicorn", "uvicorn.error")

_BATCH_INTERVAL = 0.1  # seconds
_LONGEST_BATCH = 10_000  # lines; a longer one is written by the thread that logs


class BatchedLines(logging.Handler):
    """Hands records to another handler ten times a second, from a thread of its own.

    A write releases the interpreter lock. An event loop that writes a line for each request waits each time
    for a computing thread to give the lock back.
    """

    def __init__(self, target: logging.Handler) -> None:
        super().__init__()
        self._target = target
        self._waiting: deque[logging.LogRecord] = deque()
        self._writing = threading.Lock()

    def start(self) -> None:
        """Start the thread, which lives as long as the process."""
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record."""
        self._waiting.append(record)
        if len(self._waiting) >= _LONGEST_BATCH:
            self.flush()

    def flush(self) -> None:
        """Write all records that wait. `logging` does this at the end of the process too."""
        with self._writing:
            while self._waiting:
                self._target.handle(self._waiting.popleft())

    def _write(self) -> None:
        while True:
            time.sleep(_BATCH_INTERVAL)
            self.flush()


def configure_logging(form: LogFormat, *, batched: Sequence[str] = ()) -> None:
    """Write every log record of this process to standard error, one line each, also those of libraries.

    `batched`: loggers whose lines may come up to 0.1 s late, with the time at which they were logged.
    """
    # Finding the caller, thread and process is half the cost of a record, and no line holds them.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    on_terminal = sys.stderr.isatty()
    stream = logging.StreamHandler()
    stream.setFormatter(_formatter(on_terminal if form == "auto" else form == "console", colors=on_terminal))
    root = logging.getLogger()
    root.handlers = [stream]
    root.setLevel(logging.WARNING)
    for name in ("topwork", *_LIBRARIES):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
    logging.getLogger("topwork").setLevel(logging.INFO)
    # uvicorn prepares a line for each request as soon as this logger has a handler. Ours is topwork.access.
    logging.getLogger("uvicorn.access").propagate = False
    logging.captureWarnings(True)
    for name in batched:
        lines = BatchedLines(stream)
        lines.start()
        logger = logging.getLogger(name)
        logger.handlers = [lines]
        logger.propagate = False


def _formatter(console: bool, *, colors: bool) -> logging.Formatter:
    # Tracebacks hold no local variables, which may be keys or examples.
    render: tuple[Processor, ...]
    if console:
        plain = structlog.dev.plain_traceback
        render = (structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain),)
    else:
        render = (structlog.processors.format_exc_info, structlog.processors.JSONRenderer())
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=(
            _add_timestamp,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ExtraAdder(_FIELDS),
        ),
        processors=(structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render),
    )


def _add_timestamp(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Add the time at which the record was made."""
    record: logging.LogRecord = event["_record"]
    made = datetime.fromtimestamp(record.created, UTC)
    event["timestamp"] = made.isoformat(timespec="microseconds").replace("+00:00", "Z")
    return event
