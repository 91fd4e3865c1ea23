"""Inputs that wait, in the order in which they are taken: sources take turns, and each one's callers."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar


class Waiting(Protocol):
    """A caller's inputs, of which those before `next` are taken."""

    next: int

    @property
    def inputs(self) -> Sequence[Any]:
        """What is to be taken."""
        ...

    @property
    def source(self) -> Hashable:
        """From whom it comes."""
        ...


R = TypeVar("R", bound=Waiting)


class _Source(Generic[R]):
    """What one source has waiting: its requests, and how many inputs of them."""

    __slots__ = ("depth", "requests")

    def __init__(self) -> None:
        self.requests: deque[R] = deque()
        self.depth = 0


class Lane(Generic[R]):
    """The requests of one priority that have inputs not yet taken. Guarded by the lock.

    depth: inputs that wait. running: threads that have taken some and are not done. cost: seconds of a thread
    for an input, of late.
    """

    __slots__ = ("_sources", "cost", "depth", "ready", "running")

    def __init__(self, lock: threading.Lock) -> None:
        # In the order of their turns.
        self._sources: OrderedDict[Hashable, _Source[R]] = OrderedDict()
        self.depth = 0
        self.running = 0
        self.cost = 0.01
        self.ready = threading.Condition(lock)

    def add(self, request: R) -> None:
        """Behind its source's other requests."""
        source = self._sources.get(request.source)
        if source is None:
            source = self._sources[request.source] = _Source()
        source.requests.append(request)
        source.depth += len(request.inputs)
        self.depth += len(request.inputs)

    def remove(self, request: R) -> None:
        """Forgets the inputs of a request that were not taken."""
        source = self._sources.get(request.source)
        left = len(request.inputs) - request.next
        if left and source is not None and request in source.requests:
            source.requests.remove(request)
            self._gone(request.source, source, left)

    def take(self, room: int) -> list[tuple[R, int]]:
        """At most `room` inputs, each as its request and its place there: of one request of each source."""
        taken: list[tuple[R, int]] = []
        while self._sources and len(taken) < room:
            name, source = next(iter(self._sources.items()))
            request = source.requests.popleft()
            begin, end = request.next, min(request.next + room - len(taken), len(request.inputs))
            taken.extend((request, index) for index in range(begin, end))
            request.next = end
            if end < len(request.inputs):
                source.requests.append(request)
            self._sources.move_to_end(name)
            self._gone(name, source, end - begin)
        return taken

    def ahead(self, source: Hashable, count: int) -> int:
        """At most so many inputs are taken before `count` more of the source: as many of every other one."""
        own = self._depth_of(source)
        return min(self.depth, own + self._others(source) * (own + count))

    def has_share(self, source: Hashable, count: int, most: int) -> bool:
        """Whether `count` more of the source are within its share of `most`, and all within twice as many."""
        share = most / (1 + self._others(source))
        return self._depth_of(source) + count <= share and self.depth + count <= 2 * most

    def _depth_of(self, source: Hashable) -> int:
        found = self._sources.get(source)
        return 0 if found is None else found.depth

    def _others(self, source: Hashable) -> int:
        return len(self._sources) - (source in self._sources)

    def _gone(self, name: Hashable, source: _Source[R], count: int) -> None:
        source.depth -= count
        self.depth -= count
        if not source.requests:
            del self._sources[name]
