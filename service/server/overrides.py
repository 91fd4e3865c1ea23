"""What this service relies on inside uvicorn, and whether it is there and in use."""

from __future__ import annotations

from collections.abc import Mapping

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.server.connections import connections
from service.server.drain import DrainingServer
from service.server.protocol import BoundedHttpProtocol

OVERRIDDEN: Mapping[type, tuple[str, ...]] = {
    BoundedHttpProtocol: (
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
    DrainingServer: ("shutdown", "startup"),
}
"""Methods of uvicorn that a class of ours overrides: each is a limit or a promise."""

USED: Mapping[type, tuple[str, ...]] = {
    HttpToolsProtocol: (
        "cycle",
        "flow",
        "headers",
        "loop",
        "parser",
        "pipeline",
        "scope",
        "server_state",
        "timeout_keep_alive",
        "transport",
    ),
    RequestResponseCycle: (
        "body",
        "disconnected",
        "keep_alive",
        "message_event",
        "more_body",
        "response_complete",
        "response_started",
        "scope",
        "waiting_for_100_continue",
    ),
    uvicorn.Server: ("config", "server_state"),
}
"""Attributes of uvicorn's objects that those classes read or set."""


class NotInPlace(RuntimeError):
    """A part of uvicorn that this service relies on is gone, or is not the one that serves."""

    code = "not_in_place"


def check_overrides() -> None:
    """Raise NotInPlace if uvicorn lacks a method that is overridden, or an attribute that is used.

    An override that is no longer called is a limit that silently does not exist.
    """
    for own, overridden in OVERRIDDEN.items():
        theirs = own.__mro__[1]
        _refuse(theirs, [name for name in overridden if not hasattr(theirs, name)])
    for theirs, used in USED.items():
        # Attributes are there once the object is made, so the code that makes it must name them.
        made = theirs.__init__.__code__.co_names  # type: ignore[misc]
        _refuse(theirs, [name for name in used if name not in made])


def _refuse(theirs: type, missing: list[str]) -> None:
    if missing:
        raise NotInPlace(f"uvicorn {uvicorn.__version__} has no {', '.join(missing)} in {theirs.__name__}.")


def check_server() -> None:
    """Raise NotInPlace unless the server that starts is ours, with our protocol for its connections."""
    protocol = connections.protocol
    if protocol is None:
        raise NotInPlace("The server is not the one that drains. Use `topwork serve` or `bentoml serve`.")
    if not issubclass(protocol, BoundedHttpProtocol):
        raise NotInPlace(f"Connections are handled by {protocol.__name__}, which bounds no slow client.")
