"""Log lines of a process: JSON for programs, or columns for people."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog
from structlog.typing import Processor

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


def configure_logging(form: LogFormat) -> None:
    """Write every log record of this process to standard error, one line each, also those of libraries."""
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
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ExtraAdder(_FIELDS),
        ),
        processors=(structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render),
    )
