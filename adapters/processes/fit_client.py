"""Fits heads in niced child processes, so that training never starves serving.

A process talks over its standard input and output, in frames of two lengths, a JSON header, and raw arrays.
It ends when its input closes, which also happens when its parent is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from adapters.heads.head import Head
from adapters.probe.fit import Dataset, FittedProbe, OneLabel, ProbeConfig, TooCostly, expected_seconds
from adapters.processes.child import child_environment
from adapters.processes.errors import FitFailed, FitterOverloaded, FitterUnavailable
from adapters.processes.frames import Frame, read_frame, write_frame
from adapters.processes.heartbeat import LOOK_SECONDS, HeartbeatMonitor
from adapters.processes.turns import TenantTurns
from models.priority import NICENESS

# Linear algebra gets one thread: the other cores are for serving.
_ONE_THREAD: Final = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_START_SECONDS: Final = 30.0  # for a process to become ready
# Multiple of its time limit after which a fit counts as hung. The limit applies to the predicted time only.
_PATIENCE: Final = 10.0
_ATTEMPTS: Final = 2  # processes that a fit may use up
# The time of a fit on more examples than this is predicted in a thread: even counting the labels is slow.
_MANY_EXAMPLES: Final = 5_000
# Seconds between attempts to start a process while no fit waits for it.
_PAUSE_SECONDS: Final = 5.0

logger = logging.getLogger("topwork")
_Answer = TypeVar("_Answer")


class _Died(Exception):
    """The process ended or was killed before it answered."""


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    tenant: str
    dataset: Dataset
    config: ProbeConfig
    answer: asyncio.Future[FittedProbe]


class Fitter:
    """Bounded queues in front of fitting processes, in which tenants take turns. Use from one event loop.

    Fits queue by their predicted time, so that long ones never delay short ones. The first queue's process
    keeps running. The process of any other queue starts with its first fit, at a lower priority, and ends
    after `idle_seconds` without one.
    """

    def __init__(
        self, max_queue: int = 16, bounds: Sequence[float] = (math.inf,), idle_seconds: float = 600.0
    ) -> None:
        """Create a fitter.

        `max_queue`: most fits of a tenant that is alone. `bounds`: longest predicted time of the fits of each
        queue, in seconds; the last one is infinite.
        """
        self._max_queue = max_queue
        self._bounds = tuple(bounds)
        self._lines = [
            _Line(NICENESS + 2 * place, None if place == 0 else idle_seconds) for place in range(len(bounds))
        ]

    @property
    def alive(self) -> bool:
        """Whether fits are accepted: every queue is open, and the first one's process could be started."""
        return not self._lines[0].broken and all(line.open for line in self._lines)

    @property
    def queued(self) -> int:
        """Number of fits that wait or run."""
        return self._tenants().total()

    @property
    def replaced(self) -> int:
        """Number of processes that replaced one that died or was killed because it was silent."""
        return sum(line.replaced for line in self._lines)

    async def start(self) -> None:
        """Start the first process and wait until it is ready. Raises FitterUnavailable."""
        await self._lines[0].running()
        for line in self._lines:
            line.start()

    async def fit(
        self, dataset: Dataset, config: ProbeConfig = ProbeConfig(), *, tenant: str = ""
    ) -> FittedProbe:
        """Run adapters.probe.fit.fit in a child process.

        A cancelled call leaves the queue, but a running fit is not interrupted. Raises what fit raises,
        FitFailed, FitterOverloaded, FitterUnavailable.
        """
        if len(dataset.targets) > _MANY_EXAMPLES:
            seconds = await asyncio.to_thread(expected_seconds, dataset, config)
        else:
            seconds = expected_seconds(dataset, config)
        line = next(line for line, bound in zip(self._lines, self._bounds, strict=True) if seconds <= bound)
        if not self._has_share(tenant):
            raise FitterOverloaded(max(1.0, line.usual_seconds * line.queued))
        return await line.fit(tenant, dataset, config)

    async def close(self) -> None:
        """Stop the processes. Fits that wait or run raise FitterUnavailable."""
        await asyncio.gather(*(line.close() for line in self._lines))

    def _tenants(self) -> Counter[str]:
        """Return the number of fits that wait or run, by tenant."""
        return sum((line.tenants() for line in self._lines), Counter[str]())

    def _has_share(self, tenant: str) -> bool:
        """Return whether one more fit of the tenant is within its share of the queue, or is its first."""
        found = self._tenants()
        own, tenants = found[tenant], len(found.keys() | {tenant})
        if own == 0:
            return tenants <= self._max_queue
        return own < self._max_queue / tenants and found.total() < 2 * self._max_queue


class _Line:
    """The queue of one process, which runs one fit at a time; tenants take turns.

    `idle_seconds`: seconds without a fit after which the process ends; None keeps it.
    """

    def __init__(self, niceness: int, idle_seconds: float | None) -> None:
        self.replaced = 0
        self.usual_seconds = 1.0
        self.broken = True
        self.process: _Process | None = None
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
        header = {
            "task": dataset.task,
            "fingerprint": dataset.fingerprint,
            "targets": list(dataset.targets),
            "digests": list(dataset.digests),
            "groups": list(dataset.groups),
            "sampled": list(dataset.sampled),
            "config": asdict(config),
        }
        embeddings = np.ascontiguousarray(dataset.embeddings, dtype=np.float32)
        for _ in range(_ATTEMPTS):
            process = await self.running()
            if request.answer.done():
                break
            started = time.monotonic()

            def ask(process: _Process = process) -> FittedProbe:
                process.write(header, [embeddings])
                return _fitted(*process.read())

            with contextlib.suppress(_Died):
                fitted = await self._in_thread(
                    process, ask, _START_SECONDS + _PATIENCE * config.limit_seconds
                )
                self.usual_seconds += 0.2 * (time.monotonic() - started - self.usual_seconds)
                return fitted
        raise FitterUnavailable("The fitting process died twice on this request; try again later.")

    async def running(self) -> _Process:
        """Return the process, started if none is running. Raises FitterUnavailable."""
        async with self._starting:
            if self.process is None or not self.process.running:
                self.broken = True
                if self.process is not None:
                    await asyncio.to_thread(self.process.end)
                    self.replaced += 1
                process = self.process = await asyncio.to_thread(_Process, self._niceness)
                try:
                    await self._in_thread(process, process.read, _START_SECONDS)
                except _Died as error:
                    message = "The fitting process does not start; its standard error says why."
                    raise FitterUnavailable(message) from error
                process.ready = True
                self.broken = False
            return self.process

    async def _watch(self) -> None:
        """Kill the process once its heartbeats stop. The first queue's process is restarted at once."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            process = self.process
            if process is None or self._starting.locked():
                continue
            if not process.running:
                if self._idle_seconds is None:
                    await self._replace()
            elif process.ready and (silent := process.pulse.look()) is not None:
                logger.warning("the fitting process was silent for %.1f s, and is replaced", silent)
                process.kill()

    async def _replace(self) -> None:
        # A fit in progress restarts the process itself, up to _ATTEMPTS times.
        if self._current is None:
            try:
                await self.running()
            except FitterUnavailable as error:
                logger.warning("%s", error)
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _in_thread(self, process: _Process, work: Callable[[], _Answer], seconds: float) -> _Answer:
        """Run `work`, which uses the process's pipes; kill the process if it takes longer than `seconds`."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(seconds, process.kill)
        try:
            return await loop.run_in_executor(self._thread, work)
        finally:
            timer.cancel()


class _Process:
    """A fitting process and its two pipes. Blocking.

    `ready`: whether the process has reported that it is ready; its heartbeats begin then.
    """

    def __init__(self, niceness: int) -> None:
        self.ready = False
        self._child = subprocess.Popen(
            [sys.executable, "-m", "adapters.processes.fit_server", str(niceness)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment() | _ONE_THREAD,
        )
        self.pulse = HeartbeatMonitor(self._child.pid)
        self._answers: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._hearing = threading.Thread(target=self._hear, name="fitter-answers", daemon=True)
        self._hearing.start()

    def _hear(self) -> None:
        """Read frames as they arrive, so that heartbeats count even while no answer is awaited."""
        assert self._child.stdout is not None
        with self._child.stdout as pipe:
            while (frame := read_frame(pipe)) is not None:
                self.pulse.beat()
                if "beat" not in frame[0]:
                    self._answers.put(frame)
        self._answers.put(None)

    @property
    def running(self) -> bool:
        return self._child.poll() is None

    @property
    def pid(self) -> int:
        return self._child.pid

    def write(self, header: Mapping[str, Any], arrays: Sequence[NDArray[Any]]) -> None:
        assert self._child.stdin is not None
        try:
            write_frame(self._child.stdin, header, arrays)
        except OSError as error:
            self.end()
            raise _Died from error

    def read(self) -> Frame:
        frame = self._answers.get()
        if frame is None:
            self.end()
            raise _Died
        return frame

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._child.kill()

    def end(self) -> None:
        """Kill the process, wait for its end and close its pipes. A second call does nothing."""
        self.kill()
        self._child.wait()
        self._hearing.join()
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):
            self._child.stdin.close()


def _fitted(header: Mapping[str, Any], arrays: Sequence[NDArray[Any]]) -> FittedProbe:
    """Return the result that an answer holds, or raise its error."""
    match header.get("error"):
        case None:
            scores, head = arrays
            return FittedProbe(Head.from_bytes(head.tobytes()), header["report"], scores)
        case {"code": OneLabel.code, "detail": str(detail)}:
            raise OneLabel(detail)
        case {"code": TooCostly.code, "predicted": float(predicted), "limit": float(limit)}:
            raise TooCostly(predicted, limit)
        case error:
            raise FitFailed(f"The fit failed: {error}")
