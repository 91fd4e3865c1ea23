"""Inputs that wait, in the order in which they are taken: sources and their callers take turns by cost."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Hashable, Sequence
from heapq import heapify, heappop, heappush
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """Inputs of one caller, of which those before `next` are taken."""

    next: int

    def __hash__(self) -> int: ...

    @property
    def costs(self) -> Sequence[float]:
        """What each input costs."""
        ...

    @property
    def source(self) -> Hashable:
        """From whom they come."""
        ...


R = TypeVar("R", bound=Waiting)
T = TypeVar("T", bound=Hashable)

# Seconds of a thread for an input of cost 1, until they are measured.
_FIRST_PACE = 0.01


class Turns(Generic[T]):
    """Whose turn it is: of those who wait, the one that was given the least since it joined.

    One that joins begins where the others are, so that it neither waits for them nor overtakes them for long.
    """

    __slots__ = ("_entries", "_heap", "_now", "_numbers")

    def __init__(self) -> None:
        # By what each was given, and then by the order of its coming. Entries of those who left are stale.
        self._heap: list[tuple[float, int, T]] = []
        self._entries: dict[T, tuple[float, int, T]] = {}
        self._numbers = itertools.count()
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def join(self, one: T) -> None:
        """Wait from now on."""
        self._push(one, self._now)

    def leave(self, one: T) -> None:
        """Wait no more."""
        del self._entries[one]
        if len(self._heap) > 2 * len(self._entries) + 16:
            self._heap = list(self._entries.values())
            heapify(self._heap)

    def first(self) -> T:
        """The one whose turn it is. There must be one."""
        while (entry := self._heap[0]) is not self._entries.get(entry[2]):
            heappop(self._heap)
        return entry[2]

    def charge(self, one: T, cost: float) -> None:
        """Note what was given to the one whose turn it was."""
        self._now = self._entries[one][0]
        self._push(one, self._now + cost)

    def _push(self, one: T, given: float) -> None:
        entry = (given, next(self._numbers), one)
        self._entries[one] = entry
        heappush(self._heap, entry)


class _Source(Generic[R]):
    """What one source has waiting: its requests in their turns, how many inputs, and what they cost."""

    __slots__ = ("cost", "depth", "turns")

    def __init__(self) -> None:
        self.turns: Turns[R] = Turns()
        self.depth = 0
        self.cost = 0.0


class FairQueue(Generic[R]):
    """Requests that have inputs not yet taken. Guarded by the lock.

    A cost is in units of a small input's. depth: inputs that wait. cost: of all of them. pace: seconds of a
    thread for a cost of 1, a running mean. running: threads that have taken some and are not done.
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
        """From whom something waits."""
        return frozenset(self._sources)

    def add(self, request: R) -> None:
        """Behind what its source has had so far."""
        source = self._sources.get(request.source)
        if source is None:
            source = self._sources[request.source] = _Source()
            self._turns.join(request.source)
        source.turns.join(request)
        self._count(source, len(request.costs), sum(request.costs))

    def remove(self, request: R) -> None:
        """Forget the inputs of a request that were not taken."""
        left = request.costs[request.next :]
        if not left:
            return
        request.next = len(request.costs)
        self._gone(request, len(left), sum(left))

    def take(self, room: int, budget: float = math.inf) -> list[tuple[R, int]]:
        """At most `room` inputs, each as its request and its place there, that cost no more than the budget.

        The first is taken whatever it costs.
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
        """At most so much is taken before inputs of this cost of the source: as much of every other one."""
        own = self._sources[source].cost if source in self._sources else 0.0
        others = (found.cost for name, found in self._sources.items() if name != source)
        return own + sum(min(theirs, own + cost) for theirs in others)

    def depth_of(self, source: Hashable) -> int:
        """Inputs of the source that wait."""
        found = self._sources.get(source)
        return 0 if found is None else found.depth

    def _gone(self, request: R, count: int, cost: float) -> None:
        """Some inputs of a request wait no more."""
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
        # Sums of fractions never come back to nothing by themselves.
        self.cost = self.cost + cost if self.depth else 0.0


class Priority(Generic[R]):
    """The two lanes of what is done alike: of light inputs, and of those that would hold them up.

    Guarded by the lock.
    """

    __slots__ = ("heavy", "light")

    def __init__(self, lock: threading.Lock) -> None:
        self.light: FairQueue[R] = FairQueue(lock)
        self.heavy: FairQueue[R] = FairQueue(lock)

    @property
    def lanes(self) -> tuple[FairQueue[R], FairQueue[R]]:
        """Both."""
        return self.light, self.heavy

    @property
    def depth(self) -> int:
        """Inputs that wait in both."""
        return self.light.depth + self.heavy.depth

    @property
    def running(self) -> int:
        """Threads that have taken some of either and are not done."""
        return self.light.running + self.heavy.running

    @property
    def seconds(self) -> float:
        """Of one thread, for all that waits."""
        return sum(lane.cost * lane.pace for lane in self.lanes)

    def has_share(self, source: Hashable, count: int, most: int) -> bool:
        """Whether `count` more of the source are within its share of `most`, and all within twice as many."""
        others = len((self.light.sources | self.heavy.sources) - {source})
        own = self.light.depth_of(source) + self.heavy.depth_of(source)
        return own + count <= most / (1 + others) and self.depth + count <= 2 * most
