"""The access log: one line per request."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from starlette.types import Scope

    from service.edge.channel import RequestChannel

_logger = logging.getLogger("topwork.access")

_LOGGED_PATH = 200  # characters; longer paths are cut
_EXAMPLES = "/examples/"
_PRINTED = "/:@!$&'()*+,;="
_NO_PARAMETERS: Mapping[str, str] = {}


def log_request(scope: Scope, channel: RequestChannel, status: int, seconds: float) -> None:
    """Log a request that has just been answered; nothing of its body or its answer."""
    method, path = scope["method"], logged(scope["path"])
    adapter = channel.adapter or scope.get("path_params", _NO_PARAMETERS).get("adapter")
    facts = {
        "method": method,
        "route": getattr(scope.get("route"), "path", None),
        "status": status,
        "seconds": round(seconds, 6),
        "bytes_in": channel.bytes,
        "bytes_out": channel.bytes_sent,
        "tenant": channel.tenant or None,
        "adapter": None if adapter is None else logged(adapter),
        "request_id": channel.request_id,
    }
    _logger.info("%s %s %d", method, path, status, extra=facts)


def logged(path: str) -> str:
    """Return the path as logged: printable ASCII, without an example's id, which must not stay in logs."""
    kept, examples, _ = path.partition(_EXAMPLES)
    return quote((kept + examples)[:_LOGGED_PATH], safe=_PRINTED)
