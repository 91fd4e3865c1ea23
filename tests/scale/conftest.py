"""Databases with few tenants and with many, which all these tests share."""

from __future__ import annotations

import pytest

from tests.support.adapters.crowd import FEW, MANY, populate
from tests.support.storage import new_schema


@pytest.fixture(scope="session")
def crowds(postgres_server: str) -> dict[int, str]:
    """URLs of databases by their number of tenants."""
    urls = {count: new_schema(postgres_server) for count in (FEW, MANY)}
    for count, url in urls.items():
        populate(url, count)
    return urls
