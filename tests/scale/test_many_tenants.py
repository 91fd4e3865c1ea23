"""What housekeeping and start-up cost does not grow with the number of tenants."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from adapters.registry.registry import Registry
from tests.support.adapters.crowd import grows_not


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(lambda registry: registry.tenants.find("0" * 15 + "5"), id="key"),
        pytest.param(lambda registry: registry.resolve("t5", "pets"), id="alias"),
        pytest.param(lambda registry: registry.changed(registry.changed(None).position), id="poll"),
        pytest.param(lambda registry: registry.jobs.settle(), id="settle"),
    ],
)
def test_a_read_costs_the_same_among_many_tenants(
    postgres_server: str, crowds: dict[int, str], work: Callable[[Registry], object]
) -> None:
    grows_not(postgres_server, crowds, work)
