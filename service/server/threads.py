"""Threads for blocking work: files, databases, megabytes of JSON. Tenants take turns on them."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from adapters.processes.turns import TenantTurns

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
    """An executor for an event loop in which no tenant waits for all the work of another.

    Work belongs to the tenant in whose context it is submitted. A tenant's work starts in order.
    """

    def __init__(self, most: int) -> None:
        """`most`: number of threads."""
        super().__init__(most, "blocking")
        self._most = most
        self._changing = threading.Lock()
        self._waiting: TenantTurns[_Work] = TenantTurns()
        self._running: Counter[str] = Counter()
        # The tenant that submitted last, and the different one before it, each with the time.
        self._last = self._before = ("", -math.inf)

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
