"""Queues of waiting inputs, in which sources and their callers take turns by cost."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Hashable, Sequence
from heapq import heapify, heappop, heappush
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """The inputs of one caller; those before `next` have been taken."""

    next: int

    def __hash__(self) -> int: ...

    @property
    def costs(self) -> Sequence[float]:
        """The cost of each input."""
        ...

    @property
    def source(self) -> Hashable:
        """The source of the inputs, which determines their turns and share."""
        ...


R = TypeVar("R", bound=Waiting)
T = TypeVar("T", bound=Hashable)

_FIRST_PACE = 0.01  # thread seconds per input of cost 1, until measured


class Turns(Generic[T]):
    """Fair turns: the next is the waiting member that has received the least.

    A new member starts level with the one served last, so that it is neither delayed nor favoured for long.
    """

    __slots__ = ("_entries", "_heap", "_now", "_numbers")

    def __init__(self) -> None:
        # Entries are sorted by what was received, then by arrival. Entries of members that left are stale.
        self._heap: list[tuple[float, int, T]] = []
        self._entries: dict[T, tuple[float, int, T]] = {}
        self._numbers = itertools.count()
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def join(self, one: T) -> None:
        """Add a member."""
        self._push(one, self._now)

    def leave(self, one: T) -> None:
        """Remove a member."""
        del self._entries[one]
        if len(self._heap) > 2 * len(self._entries) + 16:
            self._heap = list(self._entries.values())
            heapify(self._heap)

    def first(self) -> T:
        """Return the member whose turn it is. There must be at least one member."""
        while (entry := self._heap[0]) is not self._entries.get(entry[2]):
            heappop(self._heap)
        return entry[2]

    def charge(self, one: T, cost: float) -> None:
        """Record the cost that the member whose turn it was has received."""
        self._now = self._entries[one][0]
        self._push(one, self._now + cost)

    def _push(self, one: T, given: float) -> None:
        entry = (given, next(self._numbers), one)
        self._entries[one] = entry
        heappush(self._heap, entry)


class _Source(Generic[R]):
    """The waiting requests of one source, with the number and the total cost of their inputs."""

    __slots__ = ("cost", "depth", "turns")

    def __init__(self) -> None:
        self.turns: Turns[R] = Turns()
        self.depth = 0
        self.cost = 0.0


class FairQueue(Generic[R]):
    """Requests with inputs that have not been taken. Guarded by the lock.

    Costs are in units of a small input's. `depth`: number of waiting inputs. `cost`: their total cost.
    `pace`: thread seconds per unit of cost, a running mean. `running`: threads that have taken inputs and
    are not done.
    """

    __slots__ = ("_sources", "_turns", "cost", "depth", "pace", "ready", "running")

    def __init__(self, lock: threading.Lock) -> None:
        self._sources: dict[Hashable, _Source[R]] = {}
        self._turns: Turns[Hashable] = Turns()
        self.depth = 0
        self.cost = 0.0
        self.pace = _FIRST_PACE
        self.running = 0
        self.ready = threading.Condition(lock)

    @property
    def sources(self) -> frozenset[Hashable]:
        """Sources with waiting inputs."""
        return frozenset(self._sources)

    def add(self, request: R) -> None:
        """Queue a request's inputs behind those of the same source."""
        source = self._sources.get(request.source)
        if source is None:
            source = self._sources[request.source] = _Source()
            self._turns.join(request.source)
        source.turns.join(request)
        self._count(source, len(request.costs), sum(request.costs))

    def remove(self, request: R) -> None:
        """Drop the inputs of a request that have not been taken."""
        left = request.costs[request.next :]
        if not left:
            return
        request.next = len(request.costs)
        self._gone(request, len(left), sum(left))

    def take(self, room: int, budget: float = math.inf) -> list[tuple[R, int]]:
        """Take at most `room` inputs within the cost budget, each as (request, position in it).

        The first input is taken whatever its cost.
        """
        taken: list[tuple[R, int]] = []
        while self._sources and len(taken) < room:
            name = self._turns.first()
            request = self._sources[name].turns.first()
            begin, cost = request.next, 0.0
            for place in range(begin, min(begin + room - len(taken), len(request.costs))):
                if taken and cost + request.costs[place] > budget:
                    break
                taken.append((request, place))
                cost += request.costs[place]
                request.next = place + 1
            if request.next == begin:
                break
            budget -= cost
            self._turns.charge(name, cost)
            self._sources[name].turns.charge(request, cost)
            self._gone(request, request.next - begin, cost)
        return taken

    def ahead(self, source: Hashable, cost: float) -> float:
        """Upper bound of the cost taken before `cost` more of the source: each other source gets as much."""
        own = self._sources[source].cost if source in self._sources else 0.0
        others = (found.cost for name, found in self._sources.items() if name != source)
        return own + sum(min(theirs, own + cost) for theirs in others)

    def depth_of(self, source: Hashable) -> int:
        """The number of waiting inputs of the source."""
        found = self._sources.get(source)
        return 0 if found is None else found.depth

    def _gone(self, request: R, count: int, cost: float) -> None:
        """Account for inputs of a request that no longer wait."""
        source = self._sources[request.source]
        if request.next == len(request.costs):
            source.turns.leave(request)
        self._count(source, -count, -cost)
        if not source.turns:
            del self._sources[request.source]
            self._turns.leave(request.source)

    def _count(self, source: _Source[R], count: int, cost: float) -> None:
        source.depth += count
        self.depth += count
        source.cost += cost
        # Rounding errors would keep the sum from returning to exactly zero.
        self.cost = self.cost + cost if self.depth else 0.0


class Priority(Generic[R]):
    """The two lanes of predicts or of bulk: light inputs, and heavy ones that would delay them.

    Guarded by the lock.
    """

    __slots__ = ("heavy", "light")

    def __init__(self, lock: threading.Lock) -> None:
        self.light: FairQueue[R] = FairQueue(lock)
        self.heavy: FairQueue[R] = FairQueue(lock)

    @property
    def lanes(self) -> tuple[FairQueue[R], FairQueue[R]]:
        """Both lanes, the light one first."""
        return self.light, self.heavy

    @property
    def depth(self) -> int:
        """The number of waiting inputs in both lanes."""
        return self.light.depth + self.heavy.depth

    @property
    def running(self) -> int:
        """The number of threads that have taken inputs of either lane and are not done."""
        return self.light.running + self.heavy.running

    @property
    def seconds(self) -> float:
        """Estimated seconds that one thread would need for all waiting inputs."""
        return sum(lane.cost * lane.pace for lane in self.lanes)

    def has_share(self, source: Hashable, count: int, most: int) -> bool:
        """Whether there is room for `count` more inputs of the source.

        It must stay within its equal share of `most`, and all sources together within 2 × `most`.
        """
        others = len((self.light.sources | self.heavy.sources) - {source})
        own = self.light.depth_of(source) + self.heavy.depth_of(source)
        return own + count <= most / (1 + others) and self.depth + count <= 2 * most
