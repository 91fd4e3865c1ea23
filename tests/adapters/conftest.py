"""Databases with stores, for backups and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.adapters.storage_places import WHERE, Make, Place, Where, make_places


@pytest.fixture
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Makes places, and closes their databases at the end."""
    make, made = make_places(request, tmp_path)
    yield make
    for place in made:
        place.database.close()


@pytest.fixture(params=WHERE)
def where(request: pytest.FixtureRequest) -> Where:
    """Each kind of place."""
    found: Where = request.param
    return found


@pytest.fixture
def place(make: Make, where: Where) -> Place:
    """A place of each kind."""
    return make(where, "source")
