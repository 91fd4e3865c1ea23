"""The access log: one line per request, written in batches shortly after the answer."""

from __future__ import annotations

import asyncio
import logging
import time
from urllib.parse import quote

_logger = logging.getLogger("topwork.access")

# Writing a line at once would delay the caller's next request by a tenth of the time a short text takes.
_LATE_SECONDS = 0.1  # seconds; the longest delay of a line
_LOGGED_PATH = 200  # characters; longer paths are cut
_EXAMPLES = "/examples/"
_PRINTED = "/:@!$&'()*+,;="


class AccessLog:
    """Writes each line within 0.1 s, under the time at which it was added. For one event loop."""

    def __init__(self) -> None:
        self._lines: list[tuple[float, str, str, int, float, str]] = []
        self._due: asyncio.TimerHandle | None = None

    def add(self, method: str, path: str, status: int, seconds: float, request_id: str) -> None:
        """Add a request that has just been answered."""
        self._lines.append((time.time(), method, path, status, seconds, request_id))
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(_LATE_SECONDS, self.write)

    def write(self) -> None:
        """Write all pending lines."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        lines, self._lines = self._lines, []
        if not _logger.isEnabledFor(logging.INFO):
            return
        for at, method, path, status, seconds, request_id in lines:
            said = (method, logged(path), status, seconds * 1e3, request_id)
            record = _logger.makeRecord(
                _logger.name, logging.INFO, __file__, 0, "%s %s %d %.1fms %s", said, None
            )
            record.created, record.msecs = at, at % 1 * 1e3
            _logger.handle(record)


def logged(path: str) -> str:
    """Return the path as logged: printable ASCII, without an example's id, which must not stay in logs."""
    kept, examples, _ = path.partition(_EXAMPLES)
    return quote((kept + examples)[:_LOGGED_PATH], safe=_PRINTED)
