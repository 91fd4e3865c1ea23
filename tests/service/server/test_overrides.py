"""Members of uvicorn that the service relies on exist, and its own server is the one that serves."""

from __future__ import annotations

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.server import overrides
from service.server.connections import ConnectionTable
from service.server.overrides import OVERRIDDEN, USED, NotInPlace, check_overrides, check_server
from service.server.protocol import BoundedHttpProtocol


def test_every_override_is_of_a_method_that_exists() -> None:
    check_overrides()
    for own, names in OVERRIDDEN.items():
        assert set(names) <= set(vars(own))


def test_a_method_that_is_gone_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(HttpToolsProtocol, "send_400_response")
    with pytest.raises(NotInPlace, match="send_400_response in HttpToolsProtocol"):
        check_overrides()


def test_an_attribute_that_is_gone_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overrides, "USED", {**USED, uvicorn.Server: ("config", "no_such_state")})
    with pytest.raises(NotInPlace, match="no no_such_state in Server"):
        check_overrides()


def test_another_server_or_protocol_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ConnectionTable()
    monkeypatch.setattr(overrides, "connections", own)
    with pytest.raises(NotInPlace, match="topwork serve"):
        check_server()
    own.protocol = HttpToolsProtocol
    with pytest.raises(NotInPlace, match="HttpToolsProtocol"):
        check_server()
    own.protocol = BoundedHttpProtocol
    check_server()
