"""What housekeeping and start-up cost does not grow with the number of tenants."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from adapters.registry.registry import Registry
from tests.support.adapters.crowd import FEW, MANY, grows_not, populate
from tests.support.storage import new_schema


@pytest.fixture(scope="module")
def crowds(postgres_server: str) -> dict[int, str]:
    """URLs of databases by their number of tenants."""
    urls = {count: new_schema(postgres_server) for count in (FEW, MANY)}
    for count, url in urls.items():
        populate(url, count)
    return urls


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(lambda registry: registry.tenants.find("0" * 15 + "5"), id="key"),
        pytest.param(lambda registry: registry.resolve("t5", "pets"), id="alias"),
        pytest.param(lambda registry: registry.changed(10.0), id="poll"),
        pytest.param(lambda registry: registry.jobs.settle(), id="settle"),
    ],
)
def test_a_read_costs_the_same_among_many_tenants(
    postgres_server: str, crowds: dict[int, str], work: Callable[[Registry], object]
) -> None:
    grows_not(postgres_server, crowds, work)
