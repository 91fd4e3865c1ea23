"""Quotas by the second: what is let in, what is refused, and when to come again."""

from __future__ import annotations

from adapters.registry.quotas import Quotas
from service.edge.rate_limits import Meter, RateLimiter
from service.errors import Problem


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def let_in(meters: RateLimiter, quotas: Quotas, tenant: str = "acme", **uses: float) -> bool:
    found = meters.admit(tenant, quotas)
    if isinstance(found, Problem):
        assert found.status_code == 429
        assert found.code == "rate_exceeded"
        assert int((found.headers or {})["Retry-After"]) >= 1
        return False
    assert isinstance(found, Meter)
    for what, amount in uses.items():
        found.take(what, amount)
    return True


def test_requests_come_through_at_their_rate() -> None:
    clock = Clock()
    meters, quotas = RateLimiter(clock=clock), Quotas(requests_per_second=5)
    through = 0
    for _ in range(10_000):
        through += let_in(meters, quotas)
        clock.now += 0.01
    # Two seconds' worth was saved up.
    assert 500 <= through <= 511


def test_a_large_request_is_let_in_and_paid_for() -> None:
    clock = Clock()
    meters, quotas = RateLimiter(clock=clock), Quotas(items_per_second=5)
    assert let_in(meters, quotas, items=110)
    assert not let_in(meters, quotas)
    found = meters.admit("acme", quotas)
    assert isinstance(found, Problem)
    assert (found.headers or {})["Retry-After"] == "21"
    clock.now += 19.9
    assert not let_in(meters, quotas)
    clock.now += 0.2
    assert let_in(meters, quotas)


def test_the_tightest_quota_decides() -> None:
    clock = Clock()
    meters, quotas = RateLimiter(clock=clock), Quotas(1_000.0, 1_000.0, 10.0)
    assert let_in(meters, quotas, items=1, bytes=30)
    found = meters.admit("acme", quotas)
    assert isinstance(found, Problem)
    assert "bytes" in found.detail
    clock.now += 1.1
    assert let_in(meters, quotas)


def test_tenants_do_not_share() -> None:
    meters, quotas = RateLimiter(clock=Clock()), Quotas(items_per_second=1)
    assert let_in(meters, quotas, "one", items=100)
    assert not let_in(meters, quotas, "one")
    assert let_in(meters, quotas, "other")


def test_without_quotas_nothing_is_counted() -> None:
    meters = RateLimiter(clock=Clock())
    assert meters.admit("acme", Quotas(max_examples=3)) is None


def test_a_quota_that_changes_holds_at_once() -> None:
    clock = Clock()
    meters = RateLimiter(clock=clock)
    assert let_in(meters, Quotas(items_per_second=1), items=1_000)
    assert not let_in(meters, Quotas(items_per_second=1))
    assert meters.admit("acme", Quotas()) is None
    assert let_in(meters, Quotas(items_per_second=1), items=1_000)
    assert not let_in(meters, Quotas(items_per_second=10))
    clock.now += 100
    assert let_in(meters, Quotas(items_per_second=10))
