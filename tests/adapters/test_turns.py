"""Turns by tenant: in order, each tenant's in its own, and no place is lost."""

from __future__ import annotations

import asyncio

import pytest

from adapters.turns import Gate, TenantTurns


def test_tenants_take_turns_and_each_one_waits_in_order() -> None:
    turns: TenantTurns[str] = TenantTurns()
    for tenant, one in (("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("b", "b2")):
        turns.add(tenant, one)
    assert [turns.take() for _ in range(3)] == ["a1", "b1", "c1"]
    # Who comes back is behind those who still wait.
    turns.add("c", "c2")
    assert [turns.take() for _ in range(len(turns))] == ["a2", "b2", "c2", "a3"]
    with pytest.raises(LookupError):
        turns.take()


@pytest.mark.anyio
async def test_a_gate_lets_a_few_through_in_turns() -> None:
    gate, passed, inside = Gate(2), [], 0

    async def go(tenant: str, number: int) -> None:
        nonlocal inside
        async with gate.passed(tenant):
            inside += 1
            assert inside <= 2
            passed.append(f"{tenant}{number}")
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(go("a", number) for number in range(6)), *(go("b", number) for number in range(2)))
    assert passed.index("b0") <= 3
    assert passed.index("b1") <= 5
    assert len(passed) == 8
    await asyncio.wait_for(go("c", 0), 1.0)


@pytest.mark.anyio
async def test_who_leaves_the_line_leaves_its_place_to_others() -> None:
    gate = Gate(1)
    opened = asyncio.Event()

    async def hold(tenant: str) -> None:
        async with gate.passed(tenant):
            await opened.wait()

    tasks = [asyncio.create_task(hold(tenant)) for tenant in ("a", "b", "c", "d")]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.sleep(0)
    # Its turn came, and it leaves before it has noticed.
    tasks[0].cancel()
    await asyncio.sleep(0)
    tasks[2].cancel()
    await asyncio.gather(*tasks[:3], return_exceptions=True)
    opened.set()
    await asyncio.wait_for(tasks[3], 1.0)
    async with asyncio.timeout(1.0), gate.passed("e"):
        pass
