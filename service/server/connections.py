"""The connections that are open: how many there may be, and a look at each of them once a second."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Protocol

MOST = 4_096
# Descriptors for everything else: databases, artifacts, pipes, what is being read and written.
_ROOM = 256
_LEAST = 64
# They are looked at in so many parts, one after the other: all at once would hold up every answer.
_PARTS = 8
_LOOK_SECONDS = 1.0

CUT = ("head", "body", "unread", "silent", "idle", "refused")
"""Why a connection is cut off: what it sends too slowly, that it does not read, that it never said a word,
that it makes room for another, or that there is none for it."""


class Connection(Protocol):
    """What the table asks of a connection. part: where it is among the others, the table's own."""

    loop: asyncio.AbstractEventLoop
    transport: Any
    part: int

    @property
    def idle(self) -> bool:
        """Whether it waits for a request."""
        ...

    def look(self, passed: float) -> None:
        """Ends it where its client is too slow; so many seconds have passed since the last look."""
        ...


class ConnectionTable:
    """Those of this process. For one event loop. cut: how many were cut off, by reason.

    draining: no more are taken, and those that are there end with their next answer. drain_seconds: what a
    server that was told nothing else gives them.
    """

    def __init__(self, most: int = MOST) -> None:
        self.cut: Counter[str] = Counter()
        self.draining = False
        self.drain_seconds = 20
        self._most = most
        self._open: set[Connection] = set()
        self._idle: dict[Connection, None] = {}
        self._parts: list[set[Connection]] = [set() for _ in range(_PARTS)]
        self._looked = [0.0] * _PARTS
        self._next = 0
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        return len(self._open)

    def bound(self, descriptors: int) -> None:
        """Leaves room among so many descriptors for what else is opened."""
        self._most = max(_LEAST, min(MOST, descriptors - _ROOM))

    def admit(self, connection: Connection) -> bool:
        """Takes the connection up, closing an idle one for it if need be; False where there is no room."""
        if len(self._open) >= self._most and not self._make_room():
            self.cut["refused"] += 1
            return False
        self._open.add(connection)
        connection.part = self._smallest_part()
        self._parts[connection.part].add(connection)
        if self._timer is None or self._loop is not connection.loop:
            self._loop = connection.loop
            self._looked = [self._loop.time()] * _PARTS
            self._timer = self._loop.call_later(_LOOK_SECONDS / _PARTS, self._look)
        return True

    def discard(self, connection: Connection) -> None:
        """The connection is closed, or somebody else's."""
        self._open.discard(connection)
        self._idle.pop(connection, None)
        self._parts[connection.part].discard(connection)

    def _smallest_part(self) -> int:
        return min(range(_PARTS), key=lambda part: len(self._parts[part]))

    def _make_room(self) -> bool:
        """Closes the connection that has been idle for the longest time, as far as was seen."""
        while self._idle:
            longest = next(iter(self._idle))
            self.discard(longest)
            if longest.idle:
                self.cut["idle"] += 1
                longest.transport.close()
                return True
        return False

    def _look(self) -> None:
        assert self._loop is not None
        self._timer = self._loop.call_later(_LOOK_SECONDS / _PARTS, self._look) if self._open else None
        part, now = self._next, self._loop.time()
        self._next = (part + 1) % _PARTS
        # A process that was stopped has not waited for anybody.
        passed = min(now - self._looked[part], 2 * _LOOK_SECONDS)
        self._looked[part] = now
        for connection in tuple(self._parts[part]):
            connection.look(passed)
            if not connection.idle:
                self._idle.pop(connection, None)
            elif connection in self._open:
                self._idle.setdefault(connection, None)


connections = ConnectionTable()
"""Those of this process: servers make a protocol for each without asking."""
