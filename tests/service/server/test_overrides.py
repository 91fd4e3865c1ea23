"""Members of uvicorn that the service overrides exist."""

from __future__ import annotations

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.server.drain import DrainingServer
from service.server.overrides import OVERRIDDEN, NotInPlace, check_overrides
from service.server.protocol import BoundedHttpProtocol


def test_every_override_is_of_a_method_that_exists() -> None:
    check_overrides()
    for own in (BoundedHttpProtocol, DrainingServer):
        assert set(OVERRIDDEN[own.__name__]) <= set(vars(own))


def test_a_method_that_is_gone_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(HttpToolsProtocol, "send_400_response")
    with pytest.raises(NotInPlace, match="send_400_response in HttpToolsProtocol"):
        check_overrides()
