"""The access log: one line per request."""

from __future__ import annotations

import logging
from urllib.parse import quote

_logger = logging.getLogger("topwork.access")

_LOGGED_PATH = 200  # characters; longer paths are cut
_EXAMPLES = "/examples/"
_PRINTED = "/:@!$&'()*+,;="


def log_request(method: str, path: str, status: int, seconds: float, request_id: str) -> None:
    """Log a request that has just been answered."""
    _logger.info("%s %s %d %.1fms %s", method, logged(path), status, seconds * 1e3, request_id)


def logged(path: str) -> str:
    """Return the path as logged: printable ASCII, without an example's id, which must not stay in logs."""
    kept, examples, _ = path.partition(_EXAMPLES)
    return quote((kept + examples)[:_LOGGED_PATH], safe=_PRINTED)
