"""Threads for blocking work, on which tenants take turns.

What waits for one thing has threads of its own, so that a bucket that hangs does not hold up the database:
`await DATABASE.run(…)`, and so on. `asyncio.to_thread` is for what computes.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from adapters.turns import TenantTurns

P = ParamSpec("P")
T = TypeVar("T")

TENANT: ContextVar[str] = ContextVar("tenant", default="")
"""The tenant whose request is being answered; empty for the service's own work."""

# A tenant gets all threads if no other tenant has submitted work for this time, and otherwise a third of
# them, because computing threads slow each other down.
_ALONE_SECONDS = 1.0
_SHARES = 3


@dataclass(frozen=True, slots=True)
class _Work:
    tenant: str
    run: Callable[[], None]


class FairThreads(ThreadPoolExecutor):
    """An executor for event loops in which no tenant waits for all the work of another.

    Work belongs to the tenant in whose context it is submitted. A tenant's work starts in order.
    """

    def __init__(self, most: int, name: str = "blocking") -> None:
        """`most`: number of threads, each started when work first needs it."""
        super().__init__(most, name)
        self._most = most
        self._changing = threading.Lock()
        self._waiting: TenantTurns[_Work] = TenantTurns()
        self._running: Counter[str] = Counter()
        # The tenant that submitted last, and the different one before it, each with the time.
        self._last = self._before = ("", -math.inf)

    async def run(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `work` in one of the threads, as asyncio.to_thread does, and return its result."""
        call = partial(copy_context().run, work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self, call)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Submit work for the current tenant; see ThreadPoolExecutor.submit."""
        future: Future[T] = Future()
        tenant = TENANT.get()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._changing:
            # The service's own work never stops, so it does not count as another tenant.
            if tenant:
                if tenant != self._last[0]:
                    self._before = self._last
                self._last = (tenant, time.monotonic())
            self._waiting.add(tenant, _Work(tenant, run))
        # A thread takes the next work, which may be another tenant's, and looks again after each.
        super().submit(self._work)
        return future

    def _work(self) -> None:
        while (work := self._take()) is not None:
            try:
                work.run()
            finally:
                with self._changing:
                    self._running[work.tenant] -= 1
                    self._running += Counter()

    def _take(self) -> _Work | None:
        """Return the next work of a tenant that is below its share of the threads, None if there is none."""
        with self._changing:
            try:
                work = self._waiting.take(lambda tenant: self._running[tenant] < self._share(tenant))
            except LookupError:
                return None
            self._running[work.tenant] += 1
            return work

    def _share(self, tenant: str) -> int:
        other = self._before if self._last[0] == tenant else self._last
        return self._most if time.monotonic() - other[1] > _ALONE_SECONDS else max(1, self._most // _SHARES)


DATABASE = FairThreads(8, "database")  # as many as connections that stay open, see registry/database.py
"""Threads that wait for the database."""
STORE = FairThreads(8, "store")
"""Threads that wait for the folder or the bucket with the artifacts."""
KEYS = FairThreads(4, "keys")
"""Threads that read keys: no request begins without its key."""
POLL = FairThreads(1, "poll")
"""The thread that reads other processes' commits."""
