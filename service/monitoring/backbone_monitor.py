"""Monitors the backbones; replaces a stuck one or ends the process."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import numpy as np

from adapters.cache.networks import NetworkPool
from adapters.processes.heartbeat import ElapsedTime
from models.arrays import Floats
from models.backbone import Backbone
from models.batching.batcher import Batcher
from models.batching.request import BatcherClosed, EmbeddingFailed, QueueFull
from models.batching.stall_detector import StallDetector
from models.runtime.progress import PATIENCE
from models.spec import FLOAT16
from service.monitoring.loop_watchdog import LoopWatchdog

logger = logging.getLogger("topwork")

T = TypeVar("T")

_LOOK_SECONDS = 0.25  # between checks of the batchers' threads
_CANARY_SECONDS = 1.0  # without work, after which a backbone gets a canary
# Tolerance for each element of a canary's embedding against the first canary; the second one is for float16.
# It scales with the largest element if that exceeds 1.
_CLOSE, _CLOSE_IN_HALF = 1e-3, 5e-3
_WRONG = 3  # wrong canaries in a row, after which a backbone is replaced
_AGAIN_SECONDS = 60.0  # a second replacement within this time ends the process: replacing does not help
_OPEN_SECONDS = 30.0  # longest time to open a backbone again
_RETIRE_SECONDS = 30.0  # for which an exchanged batcher still accepts requests that hold a reference to it
_MOST_LEFT = 3  # abandoned batchers whose threads have not ended; each keeps its sessions in memory


@dataclass(slots=True)
class _Watched:
    """The state of one monitored backbone."""

    standstill: StallDetector
    first: Floats | None = None  # embedding of the first canary; None if the backbone refused it
    right: bool = True  # whether the latest canary was close to the first one
    wrong: int = 0  # wrong canaries in a row
    replaced: float = -math.inf  # time.monotonic() of the last replacement
    replacing: asyncio.Task[None] | None = None  # the task that opens the backbone again


class BackboneMonitor:
    """Monitors the batchers of backbones and of fine-tuned networks. For one event loop.

    The batcher of a reopened backbone replaces the old one in the mapping `batchers`. `replaced`: number of
    replacements so far, by part: "backbone" and "network".
    """

    def __init__(
        self,
        batchers: dict[str, Batcher],
        networks: NetworkPool,
        reopen: Callable[[str], Backbone],
        batcher_for: Callable[[Backbone], Batcher],
        end: Callable[[str], NoReturn],
    ) -> None:
        """`reopen`: opens a backbone by name; runs in a thread. `end`: ends the process, from any thread."""
        self.replaced: Counter[str] = Counter()
        self._batchers = batchers
        self._networks = networks
        self._reopen = reopen
        self._batcher_for = batcher_for
        self._end = end
        self._watched = {name: _Watched(StallDetector(batcher)) for name, batcher in batchers.items()}
        self._tuned: dict[Batcher, StallDetector] = {}
        self._left: list[Batcher] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._retiring: list[asyncio.Task[None]] = []
        self._watchdog = LoopWatchdog(end)

    @property
    def ready(self) -> bool:
        """Whether every backbone answers, and its canary as at first. A busy backbone is ready."""
        return all(
            one.right and one.standstill.quiet <= PATIENCE and self._batchers[name].alive
            for name, one in self._watched.items()
        )

    async def start(self) -> None:
        """Embed each backbone's canary for reference and start monitoring. Raises EmbeddingFailed."""
        for name, one in self._watched.items():
            found = await self._batchers[name].embed([self._batchers[name].backbone.canary], counted=False)
            # The canary is refused if a setting allows no image at all.
            one.first = None if found.errors else found.embeddings[0]
        self._tasks = [asyncio.create_task(self._canaries(name)) for name in self._watched]
        self._tasks.append(asyncio.create_task(self._look()))

    def watch_loop(self) -> None:
        """From now on, end the process if the event loop stands still.

        Called last when a service starts: its API is built in the loop, which may take seconds.
        """
        self._watchdog.start()

    async def close(self) -> None:
        """Stop monitoring. Stuck threads are left alone."""
        self._watchdog.close()
        replacing = [one.replacing for one in self._watched.values() if one.replacing is not None]
        tasks = [*self._tasks, *replacing, *self._retiring]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _look(self) -> None:
        # A process that was stopped or had no core was not stuck.
        elapsed = ElapsedTime(2 * _LOOK_SECONDS)
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            self._watchdog.turn()
            passed = elapsed.lap()
            try:
                self._look_at_backbones(passed)
                self._look_at_networks(passed)
            except Exception:
                # No error may end the monitoring.
                logger.exception("a look at the backbones failed")

    def _look_at_backbones(self, passed: float) -> None:
        for name, one in self._watched.items():
            if self._batchers[name].backbone.lost:
                # A backbone reopened in this process would fail as well.
                self._end(f"the GPU failed under the backbone {name}")
            if one.replacing is None and (why := one.standstill.look(passed)) is not None:
                self._replace(name, why)

    def _look_at_networks(self, passed: float) -> None:
        batchers = [batcher for batcher in self._networks.batchers if batcher not in self._left]
        self._tuned = {batcher: self._tuned.get(batcher) or StallDetector(batcher) for batcher in batchers}
        for batcher, standstill in self._tuned.items():
            if batcher.backbone.lost:
                self._end(f"the GPU failed under a fine-tuned network of {batcher.backbone.spec.name}")
            why = standstill.look(passed)
            if why is not None:
                logger.error("a fine-tuned network of %s is dropped: %s", batcher.backbone.spec.name, why)
                self.replaced["network"] += 1
                self._networks.abandon(batcher)
                self._leave(batcher)

    async def _canaries(self, name: str) -> None:
        """Send a canary whenever the backbone was idle for a second; otherwise its answers prove as much."""
        one = self._watched[name]
        while True:
            before = _steps(self._batchers[name])
            await asyncio.sleep(_CANARY_SECONDS)
            if _steps(self._batchers[name]) == before and one.replacing is None:
                await self._ask(name)
                if one.wrong >= _WRONG and one.replacing is None:
                    self._replace(name, f"{one.wrong} canaries in a row came back wrong")

    async def _ask(self, name: str) -> None:
        one, batcher = self._watched[name], self._batchers[name]
        try:
            found = await batcher.embed([batcher.backbone.canary], counted=False)
            right = one.first is None or _close(found.embeddings[0], one.first, batcher.backbone)
        except (QueueFull, BatcherClosed):
            return
        except EmbeddingFailed:
            right = False
        one.wrong = 0 if right else one.wrong + 1
        if right is not one.right:
            logger.warning("the canary of the backbone %s is %s", name, "right again" if right else "wrong")
        one.right = right

    def _replace(self, name: str, why: str) -> None:
        """Fail the waiting callers at once and open the backbone again; the stuck threads are left."""
        one, batcher = self._watched[name], self._batchers[name]
        logger.error("the backbone %s is replaced: %s", name, why)
        self.replaced["backbone"] += 1
        batcher.abandon()
        if time.monotonic() - one.replaced < _AGAIN_SECONDS:
            self._end(f"the backbone {name} was replaced less than {_AGAIN_SECONDS:g} s ago, and {why}")
        self._leave(batcher)
        one.replaced, one.right, one.wrong = time.monotonic(), False, 0
        one.replacing = asyncio.create_task(self._open(name))

    async def _open(self, name: str) -> None:
        one, begun = self._watched[name], time.monotonic()
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                backbone = await _in_thread(lambda: self._reopen(name))
            await self._serve(name, backbone)
        except Exception as error:
            self._end(f"the backbone {name} cannot be opened again: {error or type(error).__name__}")
        finally:
            one.replacing = None
        await self._ask(name)
        logger.warning("the backbone %s is there again after %.1f s", name, time.monotonic() - begun)

    async def exchange(self, name: str) -> None:
        """Open a backbone with its newest plan; the one that runs finishes its work and is closed.

        Raises the errors of opening it; the running backbone then stays.
        """
        one = self._watched[name]
        while one.replacing is not None:
            # It may be reopened with the plan before the newest one.
            await asyncio.wait([one.replacing])
        before = self._batchers[name]
        one.replacing = asyncio.current_task()
        try:
            await self._serve(name, await _in_thread(lambda: self._reopen(name)))
        finally:
            one.replacing = None
        logger.info("the backbone %s runs by another plan", name)
        self._retiring = [task for task in self._retiring if not task.done()]
        self._retiring.append(asyncio.create_task(self._retire(before)))

    async def _serve(self, name: str, backbone: Backbone) -> None:
        """Let a batcher of the backbone take the place of the current one."""
        batcher = self._batcher_for(backbone)
        await batcher.start()
        self._batchers[name] = batcher
        self._watched[name].standstill = StallDetector(batcher)

    async def _retire(self, batcher: Batcher) -> None:
        """Close an exchanged batcher, once callers that hold a reference to it have used it."""
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(_RETIRE_SECONDS)
        await batcher.close()
        batcher.backbone.close()

    def _leave(self, batcher: Batcher) -> None:
        """Record an abandoned batcher. Its memory is freed only once its threads have ended."""
        self._left = [left for left in self._left if left.threads_left] + [batcher]
        if len(self._left) > _MOST_LEFT:
            self._end(f"the threads of {len(self._left)} abandoned batchers have not ended")


def _steps(batcher: Batcher) -> int:
    return sum(one.steps for one in batcher.progress)


def _close(found: Floats, first: Floats, backbone: Backbone) -> bool:
    tolerance = _CLOSE_IN_HALF if backbone.precision == FLOAT16 else _CLOSE
    most = tolerance * max(1.0, float(np.abs(first).max()))
    return bool(np.isfinite(found).all()) and float(np.abs(found - first).max()) <= most


async def _in_thread(work: Callable[[], T]) -> T:
    """Run work in a daemon thread: those of the executor may all be stuck, and would block the exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def set_result(result: T | None, error: Exception | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: T | None = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(set_result, result, failure)

    threading.Thread(target=run, name="reopening", daemon=True).start()
    return await future
