"""What housekeeping and start-up cost does not grow with the number of tenants.

Costs are pages of the database, which are the same on every machine. TOPWORK_TEST_SCALE=full compares a
thousand tenants with a million; otherwise it is a thousand with fifty thousand.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from adapters.registry.registry import Registry
from tests.support.adapters.crowd import cost, populate
from tests.support.storage import new_schema

FEW = 1_000
MANY = 1_000_000 if os.environ.get("TOPWORK_TEST_SCALE") == "full" else 50_000
GROWTH = 1.5
# Trees of indexes have one level more where there are a thousand times as many rows.
LEVELS = 30


@pytest.fixture(scope="module")
def crowds(postgres_server: str) -> dict[int, str]:
    """URLs of databases by their number of tenants."""
    urls = {count: new_schema(postgres_server) for count in (FEW, MANY)}
    for count, url in urls.items():
        populate(url, count)
    return urls


def grows_not(server: str, crowds: dict[int, str], work: Callable[[Registry], object]) -> None:
    """Assert that the work touches about as many pages among many tenants as among few."""
    pages = {}
    told = {}
    for count, url in crowds.items():
        registry = Registry(url)
        work(registry)  # a first call, which also reads the catalogue of tables
        with cost(server) as counted:
            work(registry)
        registry.close()
        pages[count], told[count] = counted.pages, counted.slowest
    assert pages[MANY] <= GROWTH * pages[FEW] + LEVELS, f"{pages}: {told[MANY]}"


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
