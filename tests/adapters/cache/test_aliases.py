from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest

from adapters.cache.aliases import AliasCache
from adapters.cache.feed import ChangeFeed
from adapters.registry.errors import RegistryUnavailable, UnknownAdapter, UnknownVersion
from adapters.registry.records import AdapterRecord, Alias, Change, Committed
from adapters.registry.registry import Registry, new_uid
from adapters.registry.statements.changes import News, Position
from tests.support.adapters.records import TEXTS, append, artifact, change, create, refit, version
from tests.support.conditions import eventually


class CountingRegistry(Registry):
    """The real registry, which notes what it is asked and can be held up or out of order."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.resolved: list[tuple[str, str, int | None]] = []
        self.broken = False
        self.unreadable = False
        self.answering = 0
        self.go = threading.Event()
        self.go.set()

    def resolve(self, tenant: str, name: str, version: int | None = None) -> Alias:
        self.resolved.append((tenant, name, version))
        if self.unreadable:
            raise RegistryUnavailable("out of order")
        try:
            return super().resolve(tenant, name, version)
        finally:
            self.answering += 1
            self.go.wait(10)

    def changed(self, position: Position | None) -> News:
        if self.broken:
            raise RegistryUnavailable("out of order")
        return super().changed(position)


@pytest.fixture
def counting(registry: Registry, registry_url: str) -> Iterator[CountingRegistry]:
    counted = CountingRegistry(registry_url)
    yield counted
    counted.close()


async def listening(registry: Registry, aliases: AliasCache) -> ChangeFeed:
    """A feed that tells the aliases of what other processes change."""
    feed = ChangeFeed(registry, interval=0.01)
    await feed.start([aliases])
    return feed


def test_a_known_alias_reads_no_database(registry: Registry, counting: CountingRegistry) -> None:
    committed = create(registry)

    async def scenario() -> None:
        aliases = AliasCache(counting)
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
        aliases = AliasCache(counting)
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
        aliases = AliasCache(counting)
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
        aliases = AliasCache(counting)
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
        aliases = AliasCache(counting)
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
        aliases = AliasCache(counting)
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
        aliases = AliasCache(counting)
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


def test_what_is_created_again_is_seen_though_the_clock_was_set_back(
    registry: Registry, counting: CountingRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = create(registry)

    async def scenario() -> None:
        aliases = AliasCache(counting)
        feed = await listening(counting, aliases)
        await aliases.get("acme", "pets")
        registry.delete_adapter("acme", "pets")
        before = old.adapter.created_at - timedelta(hours=1)
        with monkeypatch.context() as clock:
            clock.setattr(
                "adapters.registry.statements.commit.next_epoch", lambda last, now: int(before.timestamp())
            )
            again = create(registry)
        assert again.adapter.epoch < old.adapter.epoch
        await eventually(lambda: aliases.known("acme", "pets") == again.alias)
        assert await aliases.get("acme", "pets") == again.alias
        resolved = len(counting.resolved)
        await asyncio.sleep(0.2)
        assert len(counting.resolved) == resolved
        await feed.close()
        await aliases.close()

    asyncio.run(scenario())


def test_the_asked_epoch_is_reached_even_beside_an_older_read(
    registry: Registry, counting: CountingRegistry
) -> None:
    first = create(registry)

    async def scenario() -> None:
        aliases = AliasCache(counting)
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
        aliases = AliasCache(counting)
        feed = await listening(counting, aliases)
        assert feed.alive
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
        await feed.close()
        await aliases.close()
        assert not feed.alive

    asyncio.run(scenario())


def test_a_read_that_began_before_a_commit_is_not_kept_after_it_was_heard(
    registry: Registry, counting: CountingRegistry
) -> None:
    """A commit is heard once, so nothing would ever correct what was read before it."""
    first = create(registry)

    async def scenario() -> None:
        aliases = AliasCache(counting)
        feed = ChangeFeed(registry, interval=3600.0)
        await feed.start([aliases])
        counting.go.clear()
        slow = asyncio.create_task(aliases.get("acme", "pets"))
        # The registry has read the alias, and keeps the answer back.
        await eventually(lambda: counting.answering == 1)
        second = append(registry, first.adapter, "c")
        await feed.poll()
        counting.go.set()
        assert await slow == first.alias
        assert await aliases.get("acme", "pets") == second.alias
        await feed.close()
        await aliases.close()

    asyncio.run(scenario())


def test_a_change_is_read_again_until_that_succeeds(
    registry: Registry, counting: CountingRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    first = create(registry)

    async def scenario() -> None:
        aliases = AliasCache(counting)
        feed = ChangeFeed(counting, interval=3600.0)
        await feed.start([aliases])
        await aliases.get("acme", "pets")
        second = append(registry, first.adapter, "c")
        counting.unreadable = True
        await feed.poll()
        await eventually(lambda: bool(caplog.records))
        assert await aliases.get("acme", "pets") == first.alias
        counting.unreadable = False
        await eventually(lambda: aliases.known("acme", "pets") == second.alias)
        await feed.close()
        await aliases.close()

    asyncio.run(scenario())
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_while_the_database_is_out_of_order_serving_goes_on_and_the_log_says_so_once(
    registry: Registry, counting: CountingRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    first = create(registry)

    async def scenario() -> None:
        aliases = AliasCache(counting)
        feed = await listening(counting, aliases)
        await aliases.get("acme", "pets")
        counting.broken = True
        await eventually(lambda: bool(caplog.records))
        second = append(registry, first.adapter, "c")
        await asyncio.sleep(0.2)
        assert await aliases.get("acme", "pets") == first.alias
        assert feed.alive
        counting.broken = False
        await eventually(lambda: len(caplog.records) > 1)
        await eventually(lambda: aliases.known("acme", "pets") == second.alias)
        await feed.close()
        await aliases.close()

    with caplog.at_level(logging.WARNING, "topwork"):
        asyncio.run(scenario())
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


def test_keeps_a_bounded_number(registry: Registry, counting: CountingRegistry) -> None:
    for name in ("a", "b", "c"):
        create(registry, name)

    async def scenario() -> None:
        aliases = AliasCache(counting, max_entries=2)
        for name in ("a", "b", "a", "c"):
            await aliases.get("acme", name)
        assert len(aliases) == 2
        await aliases.get("acme", "a")
        assert len(counting.resolved) == 3

    asyncio.run(scenario())


class Loading:
    """A loader of networks that notes its calls, and waits until it may go on."""

    def __init__(self) -> None:
        self.asked: list[Alias] = []
        self.go = asyncio.Event()

    async def __call__(self, alias: Alias) -> None:
        self.asked.append(alias)
        await self.go.wait()


def tune(registry: Registry, adapter: AdapterRecord, network: str = "network") -> Committed:
    """A promoted version with a network of its own, as a worker commits it."""
    new = version(network=artifact(network))
    return registry.commit(replace(change(adapter), version=new, promote=True))


def test_another_processs_network_holds_once_it_is_loaded(
    registry: Registry, counting: CountingRegistry
) -> None:
    first = create(registry)

    async def scenario() -> None:
        loading = Loading()
        aliases = AliasCache(counting, load=loading)
        feed = await listening(counting, aliases)
        await aliases.get("acme", "pets")
        second = tune(registry, first.adapter)
        await eventually(lambda: bool(loading.asked))
        assert await aliases.get("acme", "pets") == first.alias
        read = len(counting.resolved)
        # A caller that knows of the commit gets it, and nothing is read again.
        for _ in range(3):
            assert await aliases.get("acme", "pets", min_epoch=second.adapter.epoch) == second.alias
        await asyncio.sleep(0.1)
        assert len(counting.resolved) == read
        assert await aliases.get("acme", "pets") == first.alias
        other = create(registry, "other")
        # A read is not kept if its adapter's creation is heard meanwhile.
        while aliases.known("acme", "other") is None:
            await aliases.get("acme", "other")
        third = refit(registry, other.adapter)
        await eventually(lambda: aliases.known("acme", "other") == third.alias)
        loading.go.set()
        await eventually(lambda: aliases.known("acme", "pets") == second.alias)
        assert await aliases.get("acme", "pets") == second.alias
        # A version that needs no other network does not wait.
        loading.go.clear()
        same = refit(registry, second.adapter, promote=False)
        await eventually(lambda: aliases.known("acme", "pets") == same.alias)
        back = registry.promote(second.adapter.uid, 1)
        await eventually(lambda: aliases.known("acme", "pets") == back.alias)
        assert loading.asked == [second.alias]
        await feed.close()
        await aliases.close()

    asyncio.run(scenario())


def test_who_asks_for_the_epoch_of_a_network_brings_it_to_the_others(
    registry: Registry, counting: CountingRegistry
) -> None:
    first = create(registry)

    async def scenario() -> None:
        loading = Loading()
        aliases = AliasCache(counting, load=loading)
        await aliases.get("acme", "pets")
        second = tune(registry, first.adapter)
        assert await aliases.get("acme", "pets", min_epoch=second.adapter.epoch) == second.alias
        assert await aliases.get("acme", "pets") == first.alias
        loading.go.set()
        await eventually(lambda: aliases.known("acme", "pets") == second.alias)

    asyncio.run(scenario())


def test_a_network_that_takes_too_long_or_fails_holds_all_the_same(
    registry: Registry, counting: CountingRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    first = create(registry)

    async def failing(alias: Alias) -> None:
        raise OSError("no disk")

    async def scenario() -> None:
        loading = Loading()
        aliases = AliasCache(counting, patience=0.3, load=loading)
        feed = await listening(counting, aliases)
        await aliases.get("acme", "pets")
        second = tune(registry, first.adapter)
        await eventually(lambda: bool(loading.asked))
        assert await aliases.get("acme", "pets") == first.alias
        # Commits that leave the network as it is do not prolong the wait.
        later = refit(registry, second.adapter, promote=False)
        assert await aliases.get("acme", "pets", min_epoch=later.adapter.epoch) == later.alias
        await eventually(lambda: aliases.known("acme", "pets") == later.alias)
        assert loading.asked == [second.alias]
        await feed.close()
        await aliases.close()

        aliases = AliasCache(counting, load=failing)
        feed = await listening(counting, aliases)
        await aliases.get("acme", "pets")
        third = tune(registry, later.adapter, "another")
        await eventually(lambda: aliases.known("acme", "pets") == third.alias)
        await feed.close()
        await aliases.close()

    with caplog.at_level(logging.WARNING, "topwork"):
        asyncio.run(scenario())
    told = [record.getMessage() for record in caplog.records]
    assert [text.partition(" beforehand: ")[2] for text in told] == ["TimeoutError()", "OSError('no disk')"]


def test_what_happens_while_a_network_loads_is_not_undone_by_it(
    registry: Registry, counting: CountingRegistry
) -> None:
    first = create(registry)

    async def scenario() -> None:
        loading = Loading()
        aliases = AliasCache(counting, load=loading)

        async def begun(adapter: AdapterRecord, network: str) -> Committed:
            """A network that is to come, and whose load is under way."""
            committed, already = tune(registry, adapter, network), len(loading.asked)
            await aliases.get("acme", "pets", min_epoch=committed.adapter.epoch)
            await eventually(lambda: len(loading.asked) > already)
            return committed

        async def settled() -> None:
            loading.go.set()
            for _ in range(10):
                await asyncio.sleep(0)
            loading.go.clear()

        # Rolled back by another process: that holds at once.
        await aliases.get("acme", "pets")
        second = await begun(first.adapter, "a")
        back = registry.promote(second.adapter.uid, 1)
        assert await aliases.get("acme", "pets", min_epoch=back.adapter.epoch) == back.alias
        assert await aliases.get("acme", "pets") == back.alias
        await settled()
        assert await aliases.get("acme", "pets") == back.alias

        # Superseded by a commit of this process.
        third = await begun(back.adapter, "b")
        own = refit(registry, third.adapter)
        aliases.put(own.alias)
        await settled()
        assert await aliases.get("acme", "pets") == own.alias

        # Superseded by another network: the first is not taken up when it is there.
        fourth = await begun(own.adapter, "c")
        fifth = await begun(fourth.adapter, "d")
        loading.go.set()
        await eventually(lambda: aliases.known("acme", "pets") != own.alias)
        assert aliases.known("acme", "pets") == fifth.alias
        loading.go.clear()

        # Older news of this process, told late, takes nothing away.
        sixth = refit(registry, fifth.adapter)
        seventh = await begun(sixth.adapter, "e")
        aliases.put(sixth.alias)
        assert await aliases.get("acme", "pets") == sixth.alias
        await settled()
        assert await aliases.get("acme", "pets") == seventh.alias

        # Deleted.
        await begun(seventh.adapter, "f")
        registry.delete_adapter("acme", "pets")
        aliases.drop("acme", "pets")
        await settled()
        assert len(aliases) == 0

    asyncio.run(scenario())


def test_where_nothing_can_answer_meanwhile_a_network_is_waited_for(
    registry: Registry, counting: CountingRegistry
) -> None:
    made = registry.commit(Change("acme", "pets", new_uid(), 0, create=TEXTS))

    async def scenario() -> None:
        loading = Loading()
        # Nothing is live.
        aliases = AliasCache(counting, load=loading)
        feed = await listening(counting, aliases)
        aliases.put(made.alias)
        first = tune(registry, made.adapter)
        await eventually(lambda: bool(loading.asked))
        assert await aliases.get("acme", "pets") == first.alias
        # Nothing is known, as after a start.
        idle = Loading()
        assert await AliasCache(counting, load=idle).get("acme", "pets") == first.alias
        assert idle.asked == []
        # The known alias was deleted since.
        registry.delete_adapter("acme", "pets")
        again = create(registry)
        second = tune(registry, again.adapter, "another")
        await eventually(lambda: aliases.known("acme", "pets") == second.alias)
        assert loading.asked == [first.alias]
        await feed.close()
        await aliases.close()

    asyncio.run(scenario())


def test_nothing_reads_the_database_once_they_are_closed(
    registry: Registry, counting: CountingRegistry
) -> None:
    committed = create(registry)

    async def scenario() -> None:
        aliases = AliasCache(counting)
        counting.go.clear()
        reading = asyncio.ensure_future(aliases.get("acme", "pets"))
        await eventually(lambda: bool(counting.resolved))
        # Later callers do not join that load, so nothing else remembers it.
        aliases.put(committed.alias)
        closing = asyncio.ensure_future(aliases.close())
        reading.cancel()
        await asyncio.sleep(0.1)
        assert not closing.done()
        counting.go.set()
        await closing

    asyncio.run(scenario())
