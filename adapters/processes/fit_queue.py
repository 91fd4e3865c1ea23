"""The queue in front of one fitting process, in which tenants take turns."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from adapters.probe.fit import Dataset, FittedProbe, ProbeConfig
from adapters.processes.errors import FitterUnavailable
from adapters.processes.fit_process import FitProcess, FitProcessDied
from adapters.processes.heartbeat import LOOK_SECONDS
from adapters.turns import TenantTurns

_START_SECONDS: Final = 30.0  # for a process to become ready
# Multiple of its time limit after which a fit counts as hung. The limit applies to the predicted time only.
_PATIENCE: Final = 10.0
_ATTEMPTS: Final = 2  # processes that a fit may use up
# Seconds between attempts to start a process while no fit waits for it.
_PAUSE_SECONDS: Final = 5.0

logger = logging.getLogger("topwork")
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    tenant: str
    dataset: Dataset
    config: ProbeConfig
    answer: asyncio.Future[FittedProbe]


class FitQueue:
    """The queue of one process, which runs one fit at a time; tenants take turns.

    `idle_seconds`: seconds without a fit after which the process ends; None keeps it.
    """

    def __init__(self, niceness: int, idle_seconds: float | None) -> None:
        self.replaced = 0  # processes that replaced a dead one
        self.usual_seconds = 1.0  # moving average of the time of a fit
        self.broken = True  # whether the process could not be started the last time
        self.process: FitProcess | None = None
        self._niceness = niceness
        self._idle_seconds = idle_seconds
        self._waiting: TenantTurns[_Request] = TenantTurns()
        self._wanted = asyncio.Event()
        self._current: _Request | None = None
        self._starting = asyncio.Lock()
        self._serving: asyncio.Task[None] | None = None
        self._monitor: asyncio.Task[None] | None = None
        # A thread reads and writes the pipes, so that 100 MB of embeddings do not block the event loop.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fitter")

    @property
    def open(self) -> bool:
        """Whether the queue takes fits."""
        return self._serving is not None and not self._serving.done()

    @property
    def queued(self) -> int:
        """Number of fits that wait or run."""
        return len(self._waiting) + (self._current is not None)

    def tenants(self) -> Counter[str]:
        """Return the number of fits that wait or run, by tenant."""
        return self._waiting.counts() + Counter([self._current.tenant] if self._current else [])

    def start(self) -> None:
        """Begin to take fits."""
        self._serving = asyncio.create_task(self._serve())
        self._monitor = asyncio.create_task(self._watch())

    async def fit(self, tenant: str, dataset: Dataset, config: ProbeConfig) -> FittedProbe:
        if not self.open:
            raise FitterUnavailable("The fitter is closed.")
        request = _Request(tenant, dataset, config, asyncio.get_running_loop().create_future())
        self._waiting.add(tenant, request)
        self._wanted.set()
        try:
            return await request.answer
        finally:
            self._waiting.remove(tenant, request)

    async def close(self) -> None:
        for task in filter(None, (self._monitor, self._serving)):
            task.cancel()
            await asyncio.wait([task])
        if self.process is not None:
            self.process.kill()
        await asyncio.to_thread(self._thread.shutdown)
        if self.process is not None:
            await asyncio.to_thread(self.process.end)
        left = [] if self._current is None else [self._current]
        while len(self._waiting):
            left.append(self._waiting.take())
        for request in left:
            if not request.answer.done():
                request.answer.set_exception(FitterUnavailable("The fitter is closed."))
        self._current = None

    async def _serve(self) -> None:
        while True:
            request = self._current = await self._next()
            if not request.answer.done():
                await self._answer(request)
            self._current = None

    async def _next(self) -> _Request:
        while not len(self._waiting):
            self._wanted.clear()
            try:
                async with asyncio.timeout(self._idle_seconds):
                    await self._wanted.wait()
            except TimeoutError:
                await self._rest()
        return self._waiting.take()

    async def _rest(self) -> None:
        async with self._starting:
            process, self.process = self.process, None
            if process is not None:
                await asyncio.to_thread(process.end)

    async def _answer(self, request: _Request) -> None:
        try:
            fitted = await self._fit(request)
        except Exception as error:
            if not request.answer.done():
                request.answer.set_exception(error)
        else:
            if not request.answer.done():
                request.answer.set_result(fitted)

    async def _fit(self, request: _Request) -> FittedProbe:
        dataset, config = request.dataset, request.config
        for _ in range(_ATTEMPTS):
            process = await self.running()
            if request.answer.done():
                break
            started = time.monotonic()
            with contextlib.suppress(FitProcessDied):
                fitted = await self._in_thread(
                    process,
                    partial(process.fit, dataset, config),
                    _START_SECONDS + _PATIENCE * config.limit_seconds,
                )
                self.usual_seconds += 0.2 * (time.monotonic() - started - self.usual_seconds)
                return fitted
        raise FitterUnavailable("The fitting process died twice on this request; try again later.")

    async def running(self) -> FitProcess:
        """Return the process, started if none is running. Raises FitterUnavailable."""
        async with self._starting:
            if self.process is None or self.process.poll() is not None:
                self.broken = True
                dead = self.process
                if dead is not None:
                    await asyncio.to_thread(dead.end)
                try:
                    # A thread would lose a process that starts while this is cancelled.
                    process = self.process = FitProcess(self._niceness)
                    self.replaced += dead is not None
                    await self._in_thread(process, process.wait_until_ready, _START_SECONDS)
                except (FitProcessDied, OSError) as error:
                    logger.warning("a fitting process does not start: %r", error)
                    message = "The fitting process does not start; the log says why."
                    raise FitterUnavailable(message) from error
                self.broken = False
            return self.process

    async def _watch(self) -> None:
        """Kill the process once its heartbeats stop. The first queue's process is restarted at once."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            process = self.process
            if process is None or self._starting.locked():
                continue
            if process.poll() is None:
                process.kill_if_silent()
            elif self._idle_seconds is None:
                await self._replace()

    async def _replace(self) -> None:
        # A fit in progress restarts the process itself, up to _ATTEMPTS times.
        if self._current is None:
            try:
                await self.running()
            except FitterUnavailable as error:
                logger.warning("%s", error)
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _in_thread(self, process: FitProcess, work: Callable[[], _Answer], seconds: float) -> _Answer:
        """Run `work`, which uses the process's pipes; kill the process if it takes longer than `seconds`."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(seconds, process.kill)
        try:
            return await loop.run_in_executor(self._thread, work)
        finally:
            timer.cancel()
