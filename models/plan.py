"""How a backbone runs best on this machine: measured at its first start here, kept beside the export."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from models.session import Device, runtime_version
from models.spec import Kind

logger = logging.getLogger("topwork")

K = TypeVar("K")

PLAN_FILE = "plan.json"
_FORMAT = 1
_BATCHES = {"cpu": (1, 8, 32), "cuda": (8, 32, 64, 128)}
# More threads than these are worth trying in one run only if that run has all of them.
_FEW_THREADS = 4
# A choice that is better by less is the machine's noise.
_CLEARLY = 1.05
_ROUNDS = 3
_ROUND_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Plan:
    """alone: threads of a run that has the machine to itself. workers: runs beside each other where inputs
    wait, with `beside` threads each. batch: inputs of one run at most. On a GPU threads mean nothing.
    """

    alone: int
    workers: int
    beside: int
    batch: int

    @classmethod
    def usual(cls, kind: Kind, device: Device, threads: int) -> Plan:
        """What is taken without measuring.

        On a CPU convolutions lose by batching (the activations leave the cache), and texts win while short.
        """
        batch = {("image", "cpu"): 1, ("text", "cpu"): 32, ("image", "cuda"): 32, ("text", "cuda"): 128}
        return cls(threads, threads, 1, batch[kind, device])


Run = Callable[[Mapping[str, Any]], object]
"""One run of a session on a feed."""


def measure(
    usual: Plan,
    device: Device,
    open_run: Callable[[int], Run],
    feed: Callable[[int], Mapping[str, Any]],
) -> Plan:
    """The fastest plan here; what is usual, where nothing is clearly faster. About a second on two cores.

    open_run(threads) opens a session. feed(n) is a batch of n.
    """
    batches = sorted({usual.batch, *_BATCHES[device]}, key=lambda n: n != usual.batch)
    if device != "cpu":
        run = open_run(1)
        rates = {n: _rate(run, feed(n), n, 1) for n in batches}
        return Plan(usual.alone, usual.workers, usual.beside, _best(rates))
    cores = usual.alone
    runs = {cores: open_run(cores)}
    threads = 1
    while threads < cores:
        runs[threads] = open_run(threads)
        threads *= 2
    alone = _best({threads: _rate(run, feed(1), 1, 1) for threads, run in runs.items()})
    ways = {
        (cores // threads, threads, n): _rate(runs[threads], feed(n), n, cores // threads)
        for threads in sorted(runs)
        if threads <= _FEW_THREADS or threads == cores
        for n in batches
    }
    return Plan(alone, *_best(ways))


def _rate(run: Run, feed: Mapping[str, Any], items: int, workers: int) -> float:
    """Items a second by so many threads, the best of some rounds."""

    def repeat(until: float) -> int:
        count = 0
        while not count or time.perf_counter() < until:
            run(feed)
            count += items
        return count

    best = 0.0
    run(feed)
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(_ROUNDS):
            begin = time.perf_counter()
            done = sum(pool.map(repeat, [begin + _ROUND_SECONDS] * workers))
            best = max(best, done / (time.perf_counter() - begin))
    return best


def _best(rates: Mapping[K, float]) -> K:
    """The fastest; the first where none is clearly faster than it."""
    first, best = next(iter(rates)), max(rates, key=lambda key: rates[key])
    return best if rates[best] > _CLEARLY * rates[first] else first


def read_plan(export: Path, usual: Plan, device: Device) -> Plan | None:
    """The plan that was measured on this machine, if there is one that can be read."""
    try:
        kept = json.loads((export / PLAN_FILE).read_text())
        if kept["about"] != _about(usual, device):
            return None
        plan = Plan(**{name: int(value) for name, value in kept["plan"].items()})
        return plan if min(plan.alone, plan.workers, plan.beside, plan.batch) > 0 else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep_plan(export: Path, usual: Plan, device: Device, plan: Plan) -> None:
    """Writes the plan beside the export; where that cannot be, the next start measures again."""
    content = json.dumps({"about": _about(usual, device), "plan": asdict(plan)}, indent=2)
    scratch = export / f".{PLAN_FILE}.{os.getpid()}"
    try:
        scratch.write_text(content + "\n")
        scratch.replace(export / PLAN_FILE)
    except OSError as error:
        logger.info("how the backbone in %s runs best is not kept: %s", export, error)
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def _about(usual: Plan, device: Device) -> dict[str, Any]:
    """What a plan depends on."""
    return {
        "format": _FORMAT,
        "onnxruntime": runtime_version(),
        "device": device,
        "threads": usual.alone,
        "processor": _processor(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
