"""A tenant of its own for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.service.caller import Caller


@pytest.fixture
def caller(server: str) -> Iterator[Caller]:
    """A tenant that nobody else uses, at the running service."""
    found = Caller(server)
    with found.http:
        yield found
