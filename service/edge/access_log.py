"""The access log: one line per request."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import quote

from adapters.storage.artifact import is_tenant

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Scope

_logger = logging.getLogger("topwork.access")

_LOGGED_PATH = 200  # characters; longer paths are cut
_EXAMPLES = "/examples/"
_PRINTED = "/:@!$&'()*+,;="
_NO_PARAMETERS: Mapping[str, str] = {}


def note_adapter(request: Request, name: str) -> None:
    """Name the adapter of a request whose path does not."""
    request.scope["state"]["adapter"] = name


def log_request(
    scope: Scope, *, status: int, seconds: float, bytes_in: int, bytes_out: int, tenant: str
) -> None:
    """Log a request that has just been answered; nothing of its body or its answer."""
    method, path, state = scope["method"], logged(scope["path"]), scope["state"]
    adapter = state.get("adapter") or scope.get("path_params", _NO_PARAMETERS).get("adapter")
    facts = {
        "method": method,
        "route": getattr(scope.get("route"), "path", None),
        "status": status,
        "seconds": round(seconds, 6),
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
        "tenant": tenant if is_tenant(tenant) else None,
        "adapter": None if adapter is None else logged(adapter),
        "request_id": state["request_id"],
    }
    _logger.info("%s %s %d", method, path, status, extra=facts)


def logged(path: str) -> str:
    """Return the path as logged: printable ASCII, without an example's id, which must not stay in logs."""
    kept, examples, _ = path.partition(_EXAMPLES)
    return quote((kept + examples)[:_LOGGED_PATH], safe=_PRINTED)
