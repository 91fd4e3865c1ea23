"""The access log: a line for each request, written a moment later and together with others."""

from __future__ import annotations

import asyncio
import logging
import time
from urllib.parse import quote

_logger = logging.getLogger("topwork.access")

# To write a line takes as long as to answer a tenth of a short text, while its caller asks again.
_LATE_SECONDS = 0.1
_LOGGED_PATH = 200
_EXAMPLES = "/examples/"
_PRINTED = "/:@!$&'()*+,;="


class AccessLog:
    """Lines written within a tenth of a second, each with the time of its request. For one event loop."""

    def __init__(self) -> None:
        self._lines: list[tuple[float, str, str, int, float, str]] = []
        self._due: asyncio.TimerHandle | None = None

    def add(self, method: str, path: str, status: int, seconds: float, request_id: str) -> None:
        """One request, which has just been answered."""
        self._lines.append((time.time(), method, path, status, seconds, request_id))
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(_LATE_SECONDS, self.write)

    def write(self) -> None:
        """All that was added and is not written yet."""
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
    """The path as it is logged: in printable ASCII, and without an example's id, which logs would keep."""
    kept, examples, _ = path.partition(_EXAMPLES)
    return quote((kept + examples)[:_LOGGED_PATH], safe=_PRINTED)
