"""Housekeeping is done for all tenants by one process, and what the others ask about it costs the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.registry.registry import Registry
from adapters.storage.open import open_store
from adapters.storage.sweeper import Swept, sweep
from tests.support.adapters.crowd import FEW, cost, grows_not


def in_vain(registry: Registry) -> None:
    with registry.chores.turn("sweep", 3_600.0):
        pass


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(lambda registry: registry.totals.counted(), id="counted"),
        pytest.param(lambda registry: registry.totals.open_jobs(), id="open jobs"),
        pytest.param(in_vain, id="turn"),
        pytest.param(lambda registry: registry.remains.uncleared, id="pages"),
        pytest.param(lambda registry: registry.remains.due_files(), id="files"),
        pytest.param(lambda registry: registry.erased_ago("0" * 31 + "5"), id="erased"),
    ],
)
def test_what_every_process_asks_costs_the_same_among_many_tenants(
    postgres_server: str, crowds: dict[int, str], work: Callable[[Registry], object]
) -> None:
    for url in crowds.values():
        registry = Registry(url)
        registry.totals.count()
        registry.close()
    grows_not(postgres_server, crowds, work)


def test_a_sweep_asks_once_for_a_thousand_adapters(
    postgres_server: str, crowds: dict[int, str], tmp_path: Path
) -> None:
    for number in range(1, FEW + 1):
        folder = tmp_path / f"t{number}" / f"{number:032x}"
        folder.mkdir(parents=True)
        (folder / f"{number:064x}-{0:016x}").touch()
    registry = Registry(crowds[FEW])
    in_vain(registry)  # connects
    with cost(postgres_server) as counted:
        assert sweep(open_store(str(tmp_path)), registry, older_than=-60.0) == Swept()
    registry.close()
    # A transaction, and one query each for artifacts and for uploads.
    assert counted.statements <= 10
