"""Many processes adapt one adapter at once: each gets versions of its own, and no example is lost."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from adapters.registry.errors import KEPT_VERSIONS
from adapters.registry.registry import Registry
from adapters.storage.open import open_store
from adapters.storage.sweeper import Swept, sweep
from tests.faults import times
from tests.faults.storage.crash_writer import TENANT, read_all, store_one

PROCESSES = 8


def adapt_often(url: str, place: str, name: str, count: int) -> dict[str, int]:
    """The numbers of the versions that this process made, by example."""
    registry, store = Registry(url), open_store(place)
    try:
        return {
            example: store_one(registry, store, "raced", example)
            for example in (f"{name}-{number}" for number in range(count))
        }
    finally:
        registry.close()


def test_versions_of_eight_processes_have_no_gap_and_none_twice(registry_url: str, tmp_path: Path) -> None:
    registry, place = Registry(registry_url), str(tmp_path / "artifacts")
    registry.migrate()
    wanted = times(1_000, 60)
    shares = [wanted // PROCESSES + (number < wanted % PROCESSES) for number in range(PROCESSES)]
    # Forked of a process without threads, which has imported everything once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        running = [
            pool.submit(adapt_often, registry_url, place, f"p{number}", share)
            for number, share in enumerate(shares)
        ]
        made = {example: version for one in running for example, version in one.result().items()}
    try:
        assert sorted(made.values()) == list(range(1, wanted + 1))
        record = registry.adapter(TENANT, "raced")
        assert {example.id for example in registry.all_examples(record.uid)[1]} == made.keys()
        assert (record.revision, record.live, record.examples) == (wanted, wanted, wanted)
        kept = sorted(version.number for version in registry.versions(record.uid))
        assert kept == list(range(wanted - KEPT_VERSIONS + 1, wanted + 1))
        # Who lost a race has taken its files back, and what a commit left unreferenced went too.
        store = open_store(place)
        assert read_all(registry, store, record.uid) == []
        assert sweep(store, registry, older_than=-60.0) == Swept()
    finally:
        registry.close()
