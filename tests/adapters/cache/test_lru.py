from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from adapters.cache.lru import ByteLRU, Owner

OWNER: Owner = ("acme", "pets")


def loader(
    value: str, calls: list[str], *, gate: asyncio.Event | None = None
) -> Callable[[], Awaitable[str]]:
    async def load() -> str:
        calls.append(value)
        if gate is not None:
            await gate.wait()
        return value

    return load


def test_keeps_the_recently_used_within_the_bytes() -> None:
    async def scenario() -> None:
        cache: ByteLRU[str] = ByteLRU(10, len)
        calls: list[str] = []
        for value in ("aaaa", "bbbb"):
            assert await cache.get(value[0], loader(value, calls), OWNER) == value
        assert await cache.get("a", loader("other", calls), OWNER) == "aaaa"
        await cache.get("c", loader("cccc", calls), OWNER)
        assert "b" not in cache
        assert "a" in cache
        assert "c" in cache
        assert (cache.bytes, len(cache), cache.hits, cache.misses, cache.evictions) == (8, 2, 1, 3, 1)
        await cache.get("d", loader("d" * 10, calls), OWNER)
        assert (cache.bytes, len(cache), cache.evictions) == (10, 1, 3)

    asyncio.run(scenario())


def test_what_is_larger_than_everything_is_served_and_evicts_nothing() -> None:
    async def scenario() -> None:
        cache: ByteLRU[str] = ByteLRU(4, len)
        calls: list[str] = []
        await cache.get("a", loader("aa", calls), OWNER)
        for _ in range(2):
            assert await cache.get("big", loader("b" * 5, calls), OWNER) == "bbbbb"
        assert calls == ["aa", "bbbbb", "bbbbb"]
        assert (cache.bytes, len(cache), cache.evictions) == (2, 1, 0)

    asyncio.run(scenario())


def test_loads_a_key_once_for_all_who_ask_meanwhile() -> None:
    async def scenario() -> None:
        cache: ByteLRU[str] = ByteLRU(10, len)
        calls: list[str] = []
        gate = asyncio.Event()
        waiting = [
            asyncio.create_task(cache.get("a", loader("aa", calls, gate=gate), OWNER)) for _ in range(20)
        ]
        other = asyncio.create_task(cache.get("b", loader("bb", calls), OWNER))
        assert await other == "bb"
        gate.set()
        assert await asyncio.gather(*waiting) == ["aa"] * 20
        assert calls == ["aa", "bb"]
        assert cache.misses == 21

    asyncio.run(scenario())


def test_a_cancelled_first_caller_takes_nobody_along() -> None:
    async def scenario() -> None:
        cache: ByteLRU[str] = ByteLRU(10, len)
        calls: list[str] = []
        gate = asyncio.Event()
        first = asyncio.create_task(cache.get("a", loader("aa", calls, gate=gate), OWNER))
        await asyncio.sleep(0)
        second = asyncio.create_task(cache.get("a", loader("aa", calls, gate=gate), OWNER))
        await asyncio.sleep(0)
        first.cancel()
        gate.set()
        assert await second == "aa"
        with pytest.raises(asyncio.CancelledError):
            await first
        assert calls == ["aa"]
        assert "a" in cache

    asyncio.run(scenario())


def test_all_who_wait_see_the_error_and_the_next_caller_loads_again() -> None:
    async def scenario() -> None:
        cache: ByteLRU[str] = ByteLRU(10, len)
        calls = 0

        async def fail() -> str:
            nonlocal calls
            calls += 1
            await asyncio.sleep(0)
            raise OSError("no disk")

        waiting = [asyncio.create_task(cache.get("a", fail, OWNER)) for _ in range(5)]
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert calls == 1
        assert all(isinstance(error, OSError) for error in errors)
        assert await cache.get("a", loader("aa", []), OWNER) == "aa"

    asyncio.run(scenario())


def test_an_error_that_nobody_waits_for_any_more_is_silent() -> None:
    async def scenario() -> list[dict[str, object]]:
        complaints: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        cache: ByteLRU[str] = ByteLRU(10, len)
        gate = asyncio.Event()

        async def fail() -> str:
            await gate.wait()
            raise OSError("no disk")

        caller = asyncio.create_task(cache.get("a", fail, OWNER))
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.sleep(0)
        gate.set()
        for _ in range(5):
            await asyncio.sleep(0)
        assert "a" not in cache
        return complaints

    assert asyncio.run(scenario()) == []


def test_what_is_dropped_while_it_loads_is_not_kept() -> None:
    async def scenario() -> None:
        cache: ByteLRU[str] = ByteLRU(10, len)
        gate = asyncio.Event()
        early = asyncio.create_task(cache.get("a", loader("old", [], gate=gate), OWNER))
        await asyncio.sleep(0)
        cache.drop("a")
        assert await cache.get("a", loader("new", []), OWNER) == "new"
        gate.set()
        assert await early == "old"
        assert await cache.get("a", loader("never", []), OWNER) == "new"
        cache.drop("a")
        cache.drop("a")
        assert cache.bytes == 0
        assert len(cache) == 0

    asyncio.run(scenario())


@pytest.mark.anyio
async def test_what_an_owner_leaves_is_dropped() -> None:
    left: list[str] = []
    cache: ByteLRU[str] = ByteLRU(100, len, left.append)
    gate = asyncio.Event()
    owners: dict[str, Owner] = {
        "a": OWNER,
        "b": ("acme", "birds"),
        "c": ("acme", None),
        "d": ("other", "pets"),
    }
    for key, owner in owners.items():
        await cache.get(key, loader(key, []), owner)
    loading = [
        asyncio.create_task(cache.get(f"{key}2", loader(f"{key}2", [], gate=gate), owner))
        for key, owner in owners.items()
    ]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    # Entries of the tenant alone belong to no adapter.
    cache.drop_of("acme", "pets")
    assert [key for key in owners if key in cache] == ["b", "d"]
    cache.drop_of("acme")
    assert [key for key in owners if key in cache] == ["d"]
    gate.set()
    assert await asyncio.gather(*loading) == ["a2", "b2", "c2", "d2"]
    assert [key for key in owners if f"{key}2" in cache] == ["d"]
    assert sorted(left) == ["a", "a2", "b", "b2", "c", "c2"]
    assert cache.bytes == 3
