"""Rates that several processes on one database enforce together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import text

from adapters.registry.quotas import Quotas, Rates, Use
from adapters.registry.registry import Registry
from service.edge.rate_limits import _PAUSE, Meter, RateLimiter, SharedBucket
from service.errors import Problem
from tests.support.conditions import eventually

SHARED = Quotas(items_per_second=100.0)
LATENCY = 0.005  # seconds until a process knows the result of a statement
STEP = 0.001  # seconds


class Process:
    """One process that counts a tenant's requests, at times that the test sets."""

    def __init__(self, rate: float, every: float, phase: float, latency: float) -> None:
        self.bucket = SharedBucket(rate, 0.0)
        self.let_in = self.refused = self.statements = 0
        self._rate, self._every = rate, every
        self._next, self._latency = phase, latency
        self._idle_from = 0.0
        self._must_tell = False
        self._asked: tuple[float, float] | None = None  # the time, and the answer

    def step(self, now: float, paid_at: float) -> float:
        """Send the requests that are due; return until when all that was told is made up for."""
        while self._next <= now:
            self._next += self._every
            if self.bucket.wait(self._rate, now):
                self.refused += 1
                continue
            self.let_in += 1
            self.bucket.take(1)
            self._must_tell |= self.bucket.must_tell()
        if self._asked is not None and now >= self._asked[0] + self._latency:
            self.bucket.hear(self._asked[1], self._asked[0], now)
            self._asked, self._idle_from = None, now + _PAUSE
        if self._must_tell and self._asked is None and now >= self._idle_from:
            self._must_tell = False
            self.statements += 1
            paid_at = max(paid_at, now) + self.bucket.tell()
            self._asked = (now, paid_at - now)
        return paid_at


def sent(
    processes: int, rate: float, demand: float, seconds: float, latency: float = LATENCY
) -> list[Process]:
    """Send `demand` requests a second in all, each process its part of them."""
    every = processes / demand
    found = [Process(rate, every, every * number / processes, latency) for number in range(processes)]
    paid_at = 0.0
    for step in range(round(seconds / STEP)):
        for process in found:
            paid_at = process.step(step * STEP, paid_at)
    return found


@pytest.mark.parametrize(
    ("processes", "rate", "seconds", "more"),
    [(1, 10, 10, 0.0), (2, 10, 10, 0.03), (2, 100, 10, 0.03), (10, 10, 60, 0.05), (10, 100, 30, 0.05)],
)
def test_a_tenant_above_its_rate_gets_it_once(
    processes: int, rate: float, seconds: float, more: float
) -> None:
    found = sent(processes, rate, 10 * rate, seconds)
    let_in, deserved = sum(process.let_in for process in found), rate * (2 + seconds)
    assert 0.98 * deserved <= let_in <= (1 + more) * deserved
    # Each process gets its part.
    assert min(process.let_in for process in found) > 0.7 * let_in / processes
    # All processes together ask about as often as one would.
    assert sum(process.statements for process in found) <= 15 * seconds


def test_processes_that_hear_late_refuse_no_more() -> None:
    found = sent(2, 10, 100, 60, latency=3.0)
    assert sum(process.let_in for process in found) >= 0.98 * 10 * (2 + 60)


@pytest.mark.parametrize(("processes", "demand"), [(1, 0.95), (2, 0.95), (10, 0.9), (16, 0.95)])
def test_a_tenant_below_its_rate_is_not_refused(processes: int, demand: float) -> None:
    assert [process.refused for process in sent(processes, 100, 100 * demand, 30)] == [0] * processes


def test_an_ordinary_tenant_costs_no_statement() -> None:
    assert [process.statements for process in sent(2, 100, 8, 60)] == [0, 0]


@pytest.fixture
def registry(postgres_url: str) -> Iterator[Registry]:
    opened = Registry(postgres_url, patience=0.5)
    opened.migrate()
    for name in ("acme", "other"):
        opened.tenants.create(name)
    yield opened
    opened.close()


@pytest.fixture
def rates(registry: Registry) -> Rates:
    assert registry.rates is not None
    return registry.rates


@asynccontextmanager
async def processes(rates: Rates) -> AsyncIterator[tuple[RateLimiter, RateLimiter]]:
    """The limiters of two processes, which tell each other."""
    limiters = RateLimiter(rates.spend), RateLimiter(rates.spend)
    loops = [asyncio.create_task(limiter.share()) for limiter in limiters]
    try:
        yield limiters
    finally:
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)


def use(limiter: RateLimiter, items: float, tenant: str = "acme") -> bool:
    """Whether a request was let in, which then uses items."""
    meter = limiter.admit(tenant, SHARED)
    if isinstance(meter, Meter):
        meter.take("items", items)
    return isinstance(meter, Meter)


def rows(registry: Registry) -> set[str]:
    """The tenants that have rows."""
    with registry._database.reading() as connection:
        return set(connection.execute(text("SELECT tenant FROM rates")).scalars())


def test_uses_of_all_processes_add_up_and_are_made_up_for(rates: Rates) -> None:
    acme, other = ("acme", "items"), ("other", "items")
    begun = time.monotonic()
    assert rates.spend([Use(*acme, 20.0)])[acme] == pytest.approx(20.0, abs=0.01)
    found = rates.spend([Use(*other, 3.0), Use(*acme, 30.0)])
    assert 50.0 - (time.monotonic() - begun) - 0.01 <= found[acme] <= 50.0
    assert found[other] == pytest.approx(3.0, abs=0.01)
    # What was made up for long ago is no credit.
    rates.spend([Use("acme", "bytes", -1_000.0)])
    assert rates.spend([Use("acme", "bytes", 1.0)])["acme", "bytes"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.anyio
async def test_a_debt_at_one_process_holds_at_the_other(rates: Rates) -> None:
    async with processes(rates) as (first, second):
        assert use(first, 10_000)
        await eventually(lambda: not use(second, 30))
        assert use(second, 30, tenant="other")
        refusal = second.admit("acme", SHARED)
        assert isinstance(refusal, Problem)
        assert 80 <= int((refusal.headers or {})["Retry-After"]) <= 105


@pytest.mark.anyio
async def test_ordinary_tenants_are_not_told_of(rates: Rates, registry: Registry) -> None:
    async with processes(rates) as (first, second):
        assert use(first, 4, tenant="other")
        assert use(second, 4, tenant="other")
        assert use(first, 10_000)
        await eventually(lambda: not use(second, 1))
    assert rows(registry) == {"acme"}


@pytest.mark.anyio
async def test_requests_do_not_wait_for_a_database_that_is_away(rates: Rates, registry: Registry) -> None:
    waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    async with processes(rates) as (first, second):
        with registry._database.writing() as connection:
            connection.execute(text("LOCK TABLE rates"))
            assert use(first, 10_000)
            await eventually(lambda: connection.execute(waiting).scalar_one())
            # Each process goes on counting alone.
            assert not use(first, 1)
            assert use(second, 30)
            assert use(second, 5_000)
        # What they use is told once it is back.
        await eventually(lambda: rates.spend([Use("acme", "items", 0.0)])["acme", "items"] > 20)


def test_an_erased_tenant_leaves_no_row(rates: Rates, registry: Registry) -> None:
    rates.spend([Use("acme", "items", 100.0), Use("other", "items", 1.0)])
    registry.erasures.tenant("acme")
    assert rates.spend([Use("acme", "items", 1.0)]) == {}
    assert rows(registry) == {"other"}
