"""The open connections: their maximum number, and a check of each once a second."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Protocol

from adapters.processes.heartbeat import ElapsedTime

MOST = 4_096
# Descriptors reserved for everything else: databases, artifacts, pipes, open files.
_ROOM = 256
_LEAST = 64
# Number of parts in which the connections are checked, one after the other: checking all at once would delay
# every answer.
_PARTS = 8
_LOOK_SECONDS = 1.0

CUT = ("head", "body", "unread", "silent", "idle", "refused")
"""Why a connection is cut off: slow head, slow body, response not read, nothing ever sent, idle and closed to
make room for another, or refused because there is no room."""


class Connection(Protocol):
    """The interface of a connection in the table. `part`: its part of the table, set by the table."""

    loop: asyncio.AbstractEventLoop
    transport: Any
    part: int

    @property
    def idle(self) -> bool:
        """Whether the connection waits for a request."""
        ...

    def look(self, passed: float) -> None:
        """End the connection if its client is too slow. `passed`: seconds since the last check."""
        ...


class ConnectionTable:
    """The connections of this process. For one event loop. `cut`: number of connections cut off, by reason.

    `protocol`: the class of all connections, None before the server starts. `draining`: the server is
    shutting down, and connections close after their next answer. `drain_seconds`: the drain timeout of a
    server that has no other.
    """

    def __init__(self, most: int = MOST) -> None:
        self.cut: Counter[str] = Counter()
        self.draining = False
        self.protocol: type[asyncio.Protocol] | None = None
        self.drain_seconds = 20
        self._most = most
        self._open: set[Connection] = set()
        self._idle: dict[Connection, None] = {}
        self._parts: list[set[Connection]] = [set() for _ in range(_PARTS)]
        self._elapsed: list[ElapsedTime] = []
        self._next = 0
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        return len(self._open)

    def bound(self, descriptors: int) -> None:
        """Limit the connections so that some of these descriptors remain for other files."""
        self._most = max(_LEAST, min(MOST, descriptors - _ROOM))

    def admit(self, connection: Connection) -> bool:
        """Add the connection, closing an idle one for it if necessary. Return False if there is no room."""
        if len(self._open) >= self._most and not self._make_room():
            self.cut["refused"] += 1
            return False
        self._open.add(connection)
        connection.part = self._smallest_part()
        self._parts[connection.part].add(connection)
        if self._timer is None or self._loop is not connection.loop:
            self._loop = connection.loop
            # Time in which this process was stopped does not count against clients.
            self._elapsed = [ElapsedTime(2 * _LOOK_SECONDS) for _ in range(_PARTS)]
            self._timer = self._loop.call_later(_LOOK_SECONDS / _PARTS, self._look)
        return True

    def discard(self, connection: Connection) -> None:
        """Remove a connection that is closed or belongs to another protocol."""
        self._open.discard(connection)
        self._idle.pop(connection, None)
        self._parts[connection.part].discard(connection)

    def _smallest_part(self) -> int:
        return min(range(_PARTS), key=lambda part: len(self._parts[part]))

    def _make_room(self) -> bool:
        """Close the connection that has been idle for the longest time, according to the checks."""
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
        part = self._next
        self._next = (part + 1) % _PARTS
        passed = self._elapsed[part].lap()
        for connection in tuple(self._parts[part]):
            connection.look(passed)
            if not connection.idle:
                self._idle.pop(connection, None)
            elif connection in self._open:
                self._idle.setdefault(connection, None)


connections = ConnectionTable()
"""The table of this process. It is global because servers construct the protocols themselves."""
