"""Heads that replicas find in memory, by how a proxy routes: simulated for a million tenants.

python -m benchmarks.scale.routing

Requests are drawn by Zipf's law over the tenants. Each replica keeps a fixed number of heads, the most
recently used. Hit rates are Che's approximation (Che, Tung and Wang, "Hierarchical web caching systems",
2002): a head is found if it was asked for in the last T requests, and T is such that as many heads as fit
were asked for in that time. It is compared with caches that are simulated request by request.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.options import asked
from benchmarks.harness.report import Report, table

Rates = NDArray[np.float64]
Routing = Literal["random", "consistent", "bounded"]

TENANTS = 1_000_000
REQUESTS = 10_000.0  # a second
POINTS = 100  # of a replica on the ring
BOUND = 1.25  # most load of a replica, as a multiple of the mean; HAProxy's hash-balance-factor 125
PLACES = 6  # replicas that a tenant's overflow may go to
DEFAULT_HEADS = 6_000  # of 8 to 11 kB, in the default TOPWORK_HEAD_CACHE_BYTES
CHECKED_REQUESTS = 2_000_000
CHECKED_DIFFERENCE = 0.01
# Short texts a second of a replica with 2 cores, see results/speed.md, and the share of it to plan with.
TEXTS, PLANNED = 450.0, 0.6


@dataclass(frozen=True, slots=True)
class Case:
    """A population, and the replicas that serve it. `heads`: that fit in the memory of one."""

    zipf: float
    replicas: int
    heads: int


CASES = (
    Case(0.8, 50, DEFAULT_HEADS),
    Case(1.0, 25, DEFAULT_HEADS),
    Case(1.0, 50, DEFAULT_HEADS),
    Case(1.0, 50, 10 * DEFAULT_HEADS),
    Case(1.0, 100, DEFAULT_HEADS),
    Case(1.2, 50, DEFAULT_HEADS),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one routing. `hottest`: load of the busiest replica, as a multiple of the mean."""

    hits: float
    hottest: float


def popularity(tenants: int, zipf: float) -> Rates:
    """Share of the requests by tenant, most asked for first: (tenants,)."""
    weights = np.arange(1, tenants + 1, dtype=np.float64) ** -zipf
    share: Rates = weights / weights.sum()
    return share


def ring(tenants: int, replicas: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The replicas of each tenant on a hash ring, first choice first: (tenants, PLACES)."""
    owners = np.repeat(np.arange(replicas), POINTS)
    order = np.argsort(rng.random(owners.size))
    owners = owners[order]
    # The next replicas along the ring that are not those before.
    following = np.empty((owners.size, PLACES), dtype=np.int64)
    for point in range(owners.size):
        found: list[int] = []
        step = point
        while len(found) < min(PLACES, replicas):
            owner = int(owners[step % owners.size])
            if owner not in found:
                found.append(owner)
            step += 1
        following[point] = found + [found[-1]] * (PLACES - len(found))
    positions = np.sort(rng.random(owners.size))
    places = np.searchsorted(positions, rng.random(tenants)) % owners.size
    routes: NDArray[np.int64] = following[places]
    return routes


def loads(share: Rates, routes: NDArray[np.int64], replicas: int, bound: float) -> list[Rates]:
    """For each replica, the shares of the requests that reach it, one for each of its tenants.

    Tenants are placed by their share, the largest first; what is over the bound goes to the next place.
    """
    room = np.full(replicas, bound / replicas)
    parts: list[list[float]] = [[] for _ in range(replicas)]
    for left, places in zip(share.tolist(), routes.tolist(), strict=True):
        for number, place in enumerate(places):
            taken = left if number == PLACES - 1 else min(left, float(room[place]))
            if taken > 0.0:
                parts[place].append(taken)
                room[place] -= taken
                left -= taken
            if left <= 0.0:
                break
    return [np.array(found) for found in parts]


def found_in_memory(rates: Rates, heads: int) -> float:
    """The rate of requests that find their head, of these requests for each tenant."""
    if rates.size <= heads:
        return float(rates.sum())
    low, high = 0.0, 1.0
    while float(-np.expm1(-rates * high).sum()) < heads:
        high *= 2.0
    for _ in range(50):
        middle = (low + high) / 2.0
        low, high = (middle, high) if float(-np.expm1(-rates * middle).sum()) < heads else (low, middle)
    return float((rates * -np.expm1(-rates * high)).sum())


def simulate(case: Case, routing: Routing, tenants: int = TENANTS) -> Outcome:
    """Hits and the hottest replica of a case."""
    share = popularity(tenants, case.zipf)
    if routing == "random":
        # Every replica sees all tenants, at the same shares.
        return Outcome(found_in_memory(share, case.heads), 1.0)
    routes = ring(tenants, case.replicas, np.random.default_rng(1))
    bound = BOUND if routing == "bounded" else float(case.replicas)
    of_replicas = loads(share, routes, case.replicas, bound)
    hits = sum(found_in_memory(parts, case.heads) for parts in of_replicas)
    return Outcome(hits, max(float(parts.sum()) for parts in of_replicas) * case.replicas)


def simulate_requests(case: Case, routing: Routing, count: int, tenants: int = TENANTS) -> float:
    """The share of hits of as many requests as `count`, one by one, after as many that are not counted."""
    rng = np.random.default_rng(2)
    drawn = np.searchsorted(np.cumsum(popularity(tenants, case.zipf)), rng.random(2 * count))
    if routing == "random":
        places = rng.integers(case.replicas, size=drawn.size)
    else:
        places = ring(tenants, case.replicas, np.random.default_rng(1))[drawn, 0]
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(case.replicas)]
    hits = 0
    for number, (tenant, place) in enumerate(zip(drawn.tolist(), places.tolist(), strict=True)):
        cache = caches[place]
        if tenant in cache:
            cache.move_to_end(tenant)
            hits += number >= count
        else:
            cache[tenant] = None
            if len(cache) > case.heads:
                cache.popitem(last=False)
    return hits / count


def main() -> int:
    """Print the tables; the exit status says whether the approximation agrees with the simulated caches."""
    asked(__doc__, (), None)
    report = Report("routing", "Heads found in memory, by how a proxy routes")
    rows = []
    for case in CASES:
        outcomes = {routing: simulate(case, routing) for routing in ("random", "consistent", "bounded")}
        rows.append(
            [f"{case.zipf:g}", str(case.replicas), f"{case.heads:,}"]
            + [
                f"{one.hits:.2f}, {REQUESTS * max(0.0, 1.0 - one.hits):,.0f}, {one.hottest:.2f}"
                for one in outcomes.values()
            ]
        )
        report.data[f"zipf {case.zipf:g}, {case.replicas} replicas, {case.heads} heads"] = {
            routing: {"hits": one.hits, "hottest": one.hottest} for routing, one in outcomes.items()
        }
    head = ["Zipf", "replicas", "heads each", "random", "consistent", f"bounded {BOUND:g}"]
    report.add(
        f"{TENANTS:,} tenants, {REQUESTS:,.0f} requests a second",
        f"{table(head, rows)}\n\nHits, heads loaded a second, load of the busiest replica over the mean.",
    )
    _check(report)
    _capacity(report)
    return report.finish()


def _check(report: Report) -> None:
    """Compare the approximation with caches that are simulated request by request."""
    case = Case(1.0, 25, 2_000)
    rows = []
    for routing in ("random", "consistent"):
        approximated = simulate(case, routing, 100_000).hits
        counted = simulate_requests(case, routing, CHECKED_REQUESTS, 100_000)
        rows.append([routing, f"{approximated:.4f}", f"{counted:.4f}"])
        report.expect(
            f"{routing}: difference to the simulated caches",
            abs(approximated - counted),
            "<=",
            CHECKED_DIFFERENCE,
        )
    report.add(
        "The approximation, checked",
        f"{table(['routing', 'approximation', 'request by request'], rows)}\n\n"
        f"100,000 tenants, {case.replicas} replicas with {case.heads:,} heads each, {CHECKED_REQUESTS:,} "
        "requests.",
    )


def _capacity(report: Report) -> None:
    """Replicas that short texts take, by requests a second."""
    rows = []
    for rate in (1_000.0, 10_000.0, 50_000.0):
        needed = int(np.ceil(rate / (TEXTS * PLANNED)))
        rows.append([f"{rate:,.0f}", f"{needed:,}", f"{int(np.ceil(needed * 4 / 3)):,}"])
    report.add(
        "Capacity",
        f"{table(['texts a second', 'replicas of 2 cores', 'with one zone of four lost'], rows)}\n\n"
        f"{TEXTS:g} texts of 16 tokens a second on 2 cores, of which {PLANNED:.0%} are planned with.",
    )


if __name__ == "__main__":
    sys.exit(main())
