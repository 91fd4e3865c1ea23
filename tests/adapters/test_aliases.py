from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from adapters.aliases import Aliases
from adapters.records import Alias, Changed
from adapters.registry import Registry, RegistryUnavailable, UnknownAdapter, UnknownVersion
from tests.adapters.test_registry import append, create, refit


class CountingRegistry(Registry):
    """The real registry, which notes what it is asked and can be held up or out of order."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.resolved: list[tuple[str, str, int | None]] = []
        self.broken = False
        self.go = threading.Event()
        self.go.set()

    def resolve(self, tenant: str, name: str, version: int | None = None) -> Alias:
        self.resolved.append((tenant, name, version))
        try:
            return super().resolve(tenant, name, version)
        finally:
            self.go.wait(10)

    def changed(self, seconds: float) -> list[Changed]:
        if self.broken:
            raise RegistryUnavailable("out of order")
        return super().changed(seconds)


@pytest.fixture
def counting(registry: Registry, registry_url: str) -> Iterator[CountingRegistry]:
    counted = CountingRegistry(registry_url)
    yield counted
    counted.close()


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to pass")


def test_a_known_alias_reads_no_database(registry: Registry, counting: CountingRegistry) -> None:
    committed = create(registry)

    async def scenario() -> None:
        aliases = Aliases(counting)
        assert await aliases.get("acme", "pets") == committed.alias
        for _ in range(5):
            assert await aliases.get("acme", "pets", min_epoch=committed.alias.epoch) == committed.alias
            assert await aliases.get("acme", "pets", version=1) == committed.alias
        assert len(counting.resolved) == 1

    asyncio.run(scenario())


def test_another_version_is_read_once_until_something_changes(
    registry: Registry, counting: CountingRegistry
) -> None:
    first = create(registry)
    second = append(registry, first.adapter, "c")

    async def scenario() -> None:
        aliases = Aliases(counting)
        aliases.put(second.alias)
        old = [await aliases.get("acme", "pets", version=1) for _ in range(3)]
        assert {alias.version for alias in old} == {1}
        assert first.version is not None
        assert old[0].artifact == first.version.artifact
        assert counting.resolved == [("acme", "pets", 1)]
        for _ in range(2):
            with pytest.raises(UnknownVersion):
                await aliases.get("acme", "pets", version=9)
        aliases.put(refit(registry, second.adapter).alias)
        await aliases.get("acme", "pets", version=1)
        assert counting.resolved.count(("acme", "pets", 1)) == 2

    asyncio.run(scenario())


def test_an_unknown_name_is_asked_for_each_time_but_once_at_a_time(counting: CountingRegistry) -> None:
    async def scenario() -> None:
        aliases = Aliases(counting)
        counting.go.clear()
        waiting = [asyncio.create_task(aliases.get("acme", "nope")) for _ in range(10)]
        await eventually(lambda: bool(counting.resolved))
        counting.go.set()
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(error, UnknownAdapter) for error in errors)
        assert len(counting.resolved) == 1
        with pytest.raises(UnknownAdapter):
            await aliases.get("acme", "nope")
        assert len(counting.resolved) == 2
        assert len(aliases) == 0

    asyncio.run(scenario())


def test_own_commits_and_deletions_hold_at_once(registry: Registry, counting: CountingRegistry) -> None:
    first = create(registry)

    async def scenario() -> None:
        aliases = Aliases(counting)
        aliases.put(first.alias)
        second = append(registry, first.adapter, "c")
        aliases.put(second.alias)
        aliases.put(first.alias)
        assert await aliases.get("acme", "pets") == second.alias
        registry.delete_adapter("acme", "pets")
        aliases.drop("acme", "pets")
        with pytest.raises(UnknownAdapter):
            await aliases.get("acme", "pets")
        again = create(registry)
        aliases.put(again.alias)
        aliases.put(second.alias)
        assert await aliases.get("acme", "pets") == again.alias

    asyncio.run(scenario())


def test_a_slow_read_does_not_undo_what_happened_meanwhile(
    registry: Registry, counting: CountingRegistry
) -> None:
    first = create(registry)

    async def scenario() -> None:
        aliases = Aliases(counting)
        counting.go.clear()
        slow = asyncio.create_task(aliases.get("acme", "pets"))
        await eventually(lambda: bool(counting.resolved))
        await asyncio.sleep(0.05)
        second = append(registry, first.adapter, "c")
        aliases.put(second.alias)
        counting.go.set()
        assert (await slow).version in (1, 2)
        assert await aliases.get("acme", "pets") == second.alias

        counting.go.clear()
        aliases = Aliases(counting)
        counting.resolved.clear()
        slow = asyncio.create_task(aliases.get("acme", "pets"))
        await eventually(lambda: bool(counting.resolved))
        await asyncio.sleep(0.05)
        registry.delete_adapter("acme", "pets")
        aliases.drop("acme", "pets")
        counting.go.set()
        await slow
        with pytest.raises(UnknownAdapter):
            await aliases.get("acme", "pets")

    asyncio.run(scenario())


def test_a_process_that_is_behind_the_asked_epoch_reads_again(
    registry: Registry, counting: CountingRegistry
) -> None:
    first = create(registry)

    async def scenario() -> None:
        aliases = Aliases(counting)
        await aliases.get("acme", "pets")
        second = append(registry, first.adapter, "c")
        assert (await aliases.get("acme", "pets")).version == 1
        assert await aliases.get("acme", "pets", min_epoch=second.adapter.epoch) == second.alias
        assert await aliases.get("acme", "pets") == second.alias
        assert (await aliases.get("acme", "pets", min_epoch=second.adapter.epoch + 1000)).version == 2
        registry.delete_adapter("acme", "pets")
        with pytest.raises(UnknownAdapter):
            await aliases.get("acme", "pets", min_epoch=second.adapter.epoch + 1)
        assert len(aliases) == 0

    asyncio.run(scenario())


def test_the_asked_epoch_is_reached_even_beside_an_older_read(
    registry: Registry, counting: CountingRegistry
) -> None:
    first = create(registry)

    async def scenario() -> None:
        aliases = Aliases(counting)
        counting.go.clear()
        slow = asyncio.create_task(aliases.get("acme", "pets"))
        await eventually(lambda: bool(counting.resolved))
        await asyncio.sleep(0.05)
        second = append(registry, first.adapter, "c")
        asked = asyncio.create_task(aliases.get("acme", "pets", min_epoch=second.adapter.epoch))
        await asyncio.sleep(0.05)
        counting.go.set()
        assert await asked == second.alias
        await slow

    asyncio.run(scenario())


def test_other_processes_commits_arrive_by_themselves(registry: Registry, counting: CountingRegistry) -> None:
    first = create(registry)
    other = create(registry, "other")

    async def scenario() -> None:
        aliases = Aliases(counting, interval=0.02)
        await aliases.start()
        assert aliases.alive
        for name in ("pets", "other"):
            await aliases.get("acme", name)
        second = append(registry, first.adapter, "c")
        await eventually(lambda: len(counting.resolved) == 3)
        await eventually(lambda: aliases.known("acme", "pets") == second.alias)
        registry.delete_adapter("acme", "pets")
        await eventually(lambda: len(aliases) == 1)
        again = create(registry)
        assert await aliases.get("acme", "pets", min_epoch=again.adapter.epoch) == again.alias
        promoted = registry.promote(other.adapter.uid, 1)
        assert promoted.adapter.epoch == other.adapter.epoch
        await aliases.close()
        assert not aliases.alive

    asyncio.run(scenario())


def test_while_the_database_is_out_of_order_serving_goes_on_and_the_log_says_so_once(
    registry: Registry, counting: CountingRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    first = create(registry)

    async def scenario() -> None:
        aliases = Aliases(counting, interval=0.01)
        await aliases.start()
        await aliases.get("acme", "pets")
        counting.broken = True
        await eventually(lambda: bool(caplog.records))
        second = append(registry, first.adapter, "c")
        await asyncio.sleep(0.2)
        assert await aliases.get("acme", "pets") == first.alias
        assert aliases.alive
        counting.broken = False
        await eventually(lambda: len(caplog.records) > 1)
        assert await aliases.get("acme", "pets") == second.alias
        await aliases.close()

    with caplog.at_level(logging.WARNING, "topwork"):
        asyncio.run(scenario())
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


def test_keeps_a_bounded_number(registry: Registry, counting: CountingRegistry) -> None:
    for name in ("a", "b", "c"):
        create(registry, name)

    async def scenario() -> None:
        aliases = Aliases(counting, max_entries=2)
        for name in ("a", "b", "a", "c"):
            await aliases.get("acme", name)
        assert len(aliases) == 2
        await aliases.get("acme", "a")
        assert len(counting.resolved) == 3

    asyncio.run(scenario())


def test_after_a_long_outage_nothing_old_is_believed(registry: Registry, counting: CountingRegistry) -> None:
    first = create(registry)

    async def scenario() -> None:
        aliases = Aliases(counting, interval=0.01)
        aliases.put(first.alias)
        await aliases.start()
        # As if the last poll that worked were longer ago than the database remembers.
        aliases._polled_at = time.monotonic() - 7200.0
        await eventually(lambda: len(aliases) == 0)
        await aliases.close()

    asyncio.run(scenario())
