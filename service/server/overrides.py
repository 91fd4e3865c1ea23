"""What this service replaces of uvicorn, and whether it is there to be replaced."""

from __future__ import annotations

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.server.drain import DrainingServer
from service.server.protocol import BoundedHttpProtocol

OVERRIDDEN = {
    "BoundedHttpProtocol": (
        "connection_made",
        "connection_lost",
        "data_received",
        "handle_websocket_upgrade",
        "on_message_begin",
        "on_headers_complete",
        "on_body",
        "on_message_complete",
        "on_response_complete",
        "send_400_response",
        "shutdown",
        "_start_asgi_task",
        "_unsupported_upgrade_warning",
    ),
    "DrainingServer": ("shutdown",),
}
"""Methods of uvicorn that a class of ours overrides: each is a limit or a promise."""


class NotInPlace(RuntimeError):
    """A part of uvicorn that this service replaces is gone, or is not the one that serves."""

    code = "not_in_place"


def check_overrides() -> None:
    """Raise NotInPlace where a method that this service overrides is none of uvicorn's any more.

    An override that is no longer called is a limit that silently does not exist.
    """
    for own, theirs in ((BoundedHttpProtocol, HttpToolsProtocol), (DrainingServer, uvicorn.Server)):
        missing = [name for name in OVERRIDDEN[own.__name__] if name not in dir(theirs)]
        if missing:
            raise NotInPlace(
                f"uvicorn {uvicorn.__version__} has no {', '.join(missing)} in {theirs.__name__}."
            )
