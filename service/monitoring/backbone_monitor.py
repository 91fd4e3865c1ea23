"""Sees whether backbones answer and the event loop turns. Replaces what is stuck, or ends the process."""

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
from models.arrays import Floats
from models.backbone import Backbone
from models.batching.batcher import Batcher
from models.batching.request import BatcherClosed, EmbeddingFailed, Overloaded
from models.batching.stall_detector import StallDetector
from models.runtime.progress import PATIENCE
from models.spec import FLOAT16

logger = logging.getLogger("topwork")

T = TypeVar("T")

_LOOK_SECONDS = 0.25
_CANARY_SECONDS = 1.0
# Between the canary's embedding and the first one, for one element and unless embeddings are larger than 1.
_CLOSE, _CLOSE_IN_HALF = 1e-3, 5e-3
# Wrong canaries one after the other for which a backbone is replaced.
_WRONG = 3
# Whoever must be replaced again so soon is not helped by it.
_AGAIN_SECONDS = 60.0
_OPEN_SECONDS = 30.0
# For which a batcher that was exchanged still takes what was on its way to it.
_RETIRE_SECONDS = 30.0
# Batchers with threads that are stuck, each with its sessions.
_MOST_LEFT = 3
# In which the event loop must turn once.
_TURN_SECONDS = 10.0
_WATCH_SECONDS = 0.5


@dataclass(slots=True)
class _Watched:
    """What is known of one backbone. right: its newest canary was as its first one."""

    standstill: StallDetector
    first: Floats | None = None
    right: bool = True
    wrong: int = 0
    replaced: float = -math.inf
    replacing: asyncio.Task[None] | None = None


class BackboneMonitor:
    """Looks after the batchers, in their own mapping, and after those of networks. For one event loop.

    replaced: how many were, of the parts `backbone` and `network`.
    """

    def __init__(
        self,
        batchers: dict[str, Batcher],
        networks: NetworkPool,
        reopen: Callable[[str], Backbone],
        batcher_for: Callable[[Backbone], Batcher],
        end: Callable[[str], NoReturn],
    ) -> None:
        """reopen(name) opens the backbone anew, in a thread. end(why) ends the process, in any thread."""
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
        """Whether every backbone answers, and as it did at first. One that is busy is ready."""
        return all(
            one.right and one.standstill.quiet <= PATIENCE and self._batchers[name].alive
            for name, one in self._watched.items()
        )

    async def start(self) -> None:
        """Asks each backbone once, for what is right. Raises EmbeddingFailed."""
        for name, one in self._watched.items():
            found = await self._batchers[name].embed([self._batchers[name].backbone.canary], counted=False)
            # A setting may allow no image at all.
            one.first = None if found.errors else found.embeddings[0]
        self._tasks = [asyncio.create_task(self._canaries(name)) for name in self._watched]
        self._tasks.append(asyncio.create_task(self._look()))
        self._watchdog.start()

    async def close(self) -> None:
        """Looks no more. What is stuck by now is left alone."""
        self._watchdog.close()
        replacing = [one.replacing for one in self._watched.values() if one.replacing is not None]
        for task in (*self._tasks, *replacing, *self._retiring):
            task.cancel()
        if self._tasks:
            await asyncio.wait([*self._tasks, *self._retiring])

    async def _look(self) -> None:
        looked = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            self._watchdog.turn()
            now = time.monotonic()
            # A process that was stopped meanwhile, or had no core, has not been stuck.
            passed, looked = min(now - looked, 2 * _LOOK_SECONDS), now
            try:
                self._look_at_backbones(passed)
                self._look_at_networks(passed)
            except Exception:
                # Whoever watches must not be the first to fall.
                logger.exception("a look at the backbones failed")

    def _look_at_backbones(self, passed: float) -> None:
        for name, one in self._watched.items():
            if self._batchers[name].backbone.lost:
                # What is opened again in this process fails as well.
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
        """Asks while nobody else does: whoever is answered shows as well that there are answers."""
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
        except (Overloaded, BatcherClosed):
            return
        except EmbeddingFailed:
            right = False
        one.wrong = 0 if right else one.wrong + 1
        if right is not one.right:
            logger.warning("the canary of the backbone %s is %s", name, "right again" if right else "wrong")
        one.right = right

    def _replace(self, name: str, why: str) -> None:
        """Ends the callers' waiting at once, and opens the backbone anew beside what is stuck."""
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
        except Exception as error:
            self._end(f"the backbone {name} cannot be opened again: {error or type(error).__name__}")
        batcher = self._batcher_for(backbone)
        await batcher.start()
        self._batchers[name] = batcher
        one.standstill = StallDetector(batcher)
        one.replacing = None
        await self._ask(name)
        logger.warning("the backbone %s is there again after %.1f s", name, time.monotonic() - begun)

    async def exchange(self, name: str) -> None:
        """Opens a backbone anew, and lets it take the place of the one that runs, which first ends its work.

        Raises what opening it raises: then everything is as before.
        """
        one, before = self._watched[name], self._batchers[name]
        if one.replacing is not None:
            # It is opened anew as it is.
            return
        one.replacing = asyncio.current_task()
        try:
            backbone = await _in_thread(lambda: self._reopen(name))
            batcher = self._batcher_for(backbone)
            await batcher.start()
            self._batchers[name] = batcher
            one.standstill = StallDetector(batcher)
        finally:
            one.replacing = None
        logger.info("the backbone %s runs by another plan", name)
        self._retiring = [task for task in self._retiring if not task.done()]
        self._retiring.append(asyncio.create_task(self._retire(before)))

    async def _retire(self, batcher: Batcher) -> None:
        """Closes what was exchanged, once those who found it there have asked it."""
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(_RETIRE_SECONDS)
        await batcher.close()
        batcher.backbone.close()

    def _leave(self, batcher: Batcher) -> None:
        """Notes what is abandoned: its memory is free only once its threads have ended."""
        self._left = [left for left in self._left if left.threads_left] + [batcher]
        if len(self._left) > _MOST_LEFT:
            self._end(f"the threads of {len(self._left)} abandoned batchers have not ended")


class LoopWatchdog:
    """A thread that ends the process once the event loop has not turned for ten seconds, for then nobody is
    answered, and nothing in the loop can help.

    Seconds are counted as this thread sees them pass: a process that is stopped does not end for it.
    """

    def __init__(self, end: Callable[[str], NoReturn]) -> None:
        self._end = end
        self._turns = 0
        self._closing = threading.Event()

    def start(self) -> None:
        """Begins to watch; from now on the loop is to call turn."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def turn(self) -> None:
        """The loop turns."""
        self._turns += 1

    def close(self) -> None:
        """Watches no more."""
        self._closing.set()

    def _watch(self) -> None:
        seen, still, looked = self._turns, 0.0, time.monotonic()
        while not self._closing.wait(_WATCH_SECONDS):
            now = time.monotonic()
            passed, looked = min(now - looked, 2 * _WATCH_SECONDS), now
            still = 0.0 if self._turns != seen else still + passed
            seen = self._turns
            if still > _TURN_SECONDS:
                self._end(f"the event loop has not turned for {still:.1f} s")


def _steps(batcher: Batcher) -> int:
    return sum(turn.steps for turn in batcher.turns)


def _close(found: Floats, first: Floats, backbone: Backbone) -> bool:
    tolerance = _CLOSE_IN_HALF if backbone.precision == FLOAT16 else _CLOSE
    most = tolerance * max(1.0, float(np.abs(first).max()))
    return bool(np.isfinite(found).all()) and float(np.abs(found - first).max()) <= most


async def _in_thread(work: Callable[[], T]) -> T:
    """The result of some work, in a thread of its own: those of the loop's executor may all be stuck, and
    whoever ends the process would wait for them.
    """
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
