"""Measures doubtful execution plans again while the service and the machine are idle."""

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
from models.runtime.autotune import ExecutionPlan, MeasuredPlan, is_quiet

logger = logging.getLogger("topwork")

_MOST_SECONDS = 120.0  # timeout of a measurement, for a machine that became busy


@dataclass(frozen=True, slots=True)
class Schedule:
    """When plans are measured. All times are in seconds."""

    idle: float = 10.0  # without a request before a measurement
    look: float = 0.01  # between checks for a request during a measurement
    again: float = 30.0  # until the next measurement of a plan still in doubt; doubles each time
    most: float = 240.0  # upper bound of that


def command(name: str) -> Sequence[str]:
    """Return the command that measures a backbone in a new process, saves the plan and prints it."""
    return sys.executable, "-m", "service.cli", "plan", "--measure", name


class Surveyor:
    """Measures doubtful plans in idle moments. For one event loop.

    `measured`: the current plan of each backbone, with its doubt. A measurement runs in a process of its own,
    which is killed as soon as a request comes.
    """

    def __init__(
        self,
        measured: dict[str, MeasuredPlan],
        batchers: Mapping[str, Batcher],
        networks: NetworkPool,
        exchange: Callable[[str], Awaitable[None]],
        *,
        quiet: Callable[[float], bool] = is_quiet,
        command: Callable[[str], Sequence[str]] = command,
        schedule: Schedule = Schedule(),
    ) -> None:
        """`exchange`: reopens a backbone by name with its plan in `measured`. `quiet`: checks for the given
        seconds, in a thread, whether other processes leave the cores idle.
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
        """Log the plans in doubt and start to wait for idle moments."""
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
        """Stop, and kill a running measurement."""
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
                    # The backbone goes on with its current plan.
                    logger.exception("how %s runs best cannot be measured", name)
                    found = None
                if found is None:
                    break
            if self._doubtful():
                await asyncio.sleep(pause)
                pause = min(2 * pause, self._schedule.most)

    async def _idle(self) -> None:
        """Wait until no request has come for a while and the machine is quiet."""
        while True:
            before = self._asked()
            await asyncio.sleep(self._schedule.idle)
            if self._asked() == before and await asyncio.to_thread(self._quiet, self._schedule.idle / 10):
                return

    async def _measure(self, name: str) -> MeasuredPlan | None:
        """Return the result of a measurement; None if a request came, it timed out, or printed no plan."""
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

    async def _adopt(self, name: str, found: MeasuredPlan) -> None:
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
        """Return the inputs submitted so far; changes with each one, and when a network is unloaded."""
        return sum(batcher.admitted for batcher in (*self._batchers.values(), *self._networks.batchers))


def _read(output: bytes) -> MeasuredPlan | None:
    """Return the measured plan that the command printed, or None."""
    try:
        told = json.loads(output)
        return MeasuredPlan(
            ExecutionPlan(**told["plan"]), float(told["others"]), float(told["spread"]), float(told["cosine"])
        )
    except (ValueError, KeyError, TypeError):
        return None
