"""Measures again, while nothing else happens, how backbones run best whose plan is in doubt."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from adapters.cache.networks import NetworkPool
from adapters.processes.child import child_environment
from models.batching.batcher import Batcher
from models.runtime.autotune import ExecutionPlan, Measured, is_quiet

logger = logging.getLogger("topwork")

# That a measurement may take, on a machine that turned busy.
_MOST_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """Seconds. idle: without a request before a measurement. look: between looks for one meanwhile.

    again, most: until the next measurement of what stays in doubt, twice as long each time, and at most.
    """

    idle: float = 10.0
    look: float = 0.01
    again: float = 30.0
    most: float = 240.0


def command(name: str) -> Sequence[str]:
    """What measures a backbone in a process of its own, keeps the plan and prints it."""
    return sys.executable, "-m", "service.cli", "plan", "--measure", name


class Surveyor:
    """For one event loop. `measured` has what is known of each backbone.

    A measurement is a process of its own, which can be ended at any moment: a request does not wait for it.
    """

    def __init__(
        self,
        measured: dict[str, Measured],
        batchers: Mapping[str, Batcher],
        networks: NetworkPool,
        exchange: Callable[[str], Awaitable[None]],
        *,
        quiet: Callable[[float], bool] = is_quiet,
        command: Callable[[str], Sequence[str]] = command,
        schedule: Schedule = Schedule(),
    ) -> None:
        """exchange(name) lets a backbone run by another plan, the one in `measured`. quiet(seconds) looks for
        so long whether other processes leave the cores alone, in a thread. command(name): see `command`.
        """
        self.measured = measured
        self._batchers = batchers
        self._networks = networks
        self._exchange = exchange
        self._quiet = quiet
        self._command = command
        self._schedule = schedule
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to wait for idle moments, if anything is in doubt."""
        for name in self._doubtful():
            found = self.measured[name]
            logger.warning(
                "how %s runs best is in doubt: others used %.0f %% of the cores while it was measured, and "
                "rounds differed by %.0f %%; it is measured again when the machine is quiet",
                name,
                100 * found.others,
                100 * found.spread,
            )
        self._task = asyncio.create_task(self._survey())

    async def close(self) -> None:
        """Ends what is being measured."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def _doubtful(self) -> list[str]:
        return [name for name, found in self.measured.items() if not found.confirmed]

    async def _survey(self) -> None:
        pause = self._schedule.again
        while doubtful := self._doubtful():
            await self._idle()
            for name in doubtful:
                try:
                    found = await self._measure(name)
                    if found is not None:
                        await self._adopt(name, found)
                except Exception:
                    # What serves goes on by the plan that it has.
                    logger.exception("how %s runs best cannot be measured", name)
                    found = None
                if found is None:
                    break
            if self._doubtful():
                await asyncio.sleep(pause)
                pause = min(2 * pause, self._schedule.most)

    async def _idle(self) -> None:
        """Returns once no request has come for a while and the machine is quiet."""
        while True:
            before = self._asked()
            await asyncio.sleep(self._schedule.idle)
            if self._asked() == before and await asyncio.to_thread(self._quiet, self._schedule.idle / 10):
                return

    async def _measure(self, name: str) -> Measured | None:
        """What a process found; None where a request came, or where it said nothing."""
        before = self._asked()
        process = await asyncio.create_subprocess_exec(
            *self._command(name),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env=child_environment(),
        )
        begun = time.monotonic()
        try:
            output = asyncio.ensure_future(process.communicate())
            while not (await asyncio.wait([output], timeout=self._schedule.look))[0]:
                if self._asked() != before or time.monotonic() - begun > _MOST_SECONDS:
                    return None
            return _read(output.result()[0])
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _adopt(self, name: str, found: Measured) -> None:
        before = self.measured[name]
        if not found.confirmed and found.doubt >= before.doubt:
            return
        self.measured[name] = found
        running = self._batchers[name].backbone.plan
        state = "confirmed" if found.confirmed else "still in doubt"
        logger.info("how %s runs best was measured again and is %s: %s", name, state, found.plan)
        if found.plan != running:
            await self._exchange(name)

    def _asked(self) -> int:
        """Inputs sent so far. It changes with each, and when a network leaves."""
        return sum(batcher.admitted for batcher in (*self._batchers.values(), *self._networks.batchers))


def _read(output: bytes) -> Measured | None:
    """What the command printed."""
    try:
        told = json.loads(output)
        return Measured(
            ExecutionPlan(**told["plan"]), float(told["others"]), float(told["spread"]), float(told["cosine"])
        )
    except (ValueError, KeyError, TypeError):
        return None
