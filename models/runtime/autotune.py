"""How a backbone runs best on this machine: measured at its first start here, kept beside the export.

On a busy machine a measurement says little: it is kept as doubtful, until a quiet one takes its place.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from models.runtime.driver import gpu_name
from models.runtime.session import Device, runtime_version
from models.runtime.usage import Usage
from models.spec import Kind

logger = logging.getLogger("topwork")

K = TypeVar("K")
T = TypeVar("T")

PLAN_FILE = "plan.json"
_FORMAT = 6
# The usual one first. More images at once would take more memory and gain nothing.
BATCHES: Mapping[Kind, Sequence[int]] = {"image": (2, 1, 4), "text": (32, 1, 8)}
BATCHES_ON_GPU: Mapping[Kind, Sequence[int]] = {
    "image": (8, 32, 64, 128, 256),
    "text": (32, 128, 256, 512, 1024),
}
# Between single precision and any other way to compute the same embedding.
_MIN_COSINE = 0.9999
# More threads than these are worth trying in one run only if that run has all of them.
_FEW_THREADS = 4
# A choice that is better by less is the machine's noise; on a machine that others use, by much less.
_CLEARLY, _CLEARLY_IN_DOUBT = 1.05, 2.0
_ROUNDS = 5
_ROUND_SECONDS = 0.02
# Above these a measurement is doubtful: the share of the cores that others used meanwhile, and by how much
# rounds of one way lie below the best of them.
_MOST_OTHERS = 0.1
_MOST_SPREAD = 0.2
# In which it shows whether others use the cores.
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class ExecutionPlan:
    """alone: threads of a run that has the machine to itself. workers: runs beside each other where inputs
    wait, with `beside` threads each. batch: inputs of one run at most.

    On a GPU the workers prepare inputs, and threads mean nothing. half: it computes in float16. graphs: it
    replays CUDA graphs. channels_last: convolutions have the channels of a pixel beside each other.
    """

    alone: int
    workers: int
    beside: int
    batch: int
    half: bool = False
    graphs: bool = False
    channels_last: bool = False

    @classmethod
    def usual(cls, kind: Kind, device: Device, threads: int) -> ExecutionPlan:
        """What is taken without measuring.

        On a CPU convolutions gain little by batching (the activations leave the cache), and short texts much.
        """
        batch = BATCHES[kind][0] if device == "cpu" else {"image": 32, "text": 128}[kind]
        return cls(threads, threads, 1, batch)


@dataclass(frozen=True, slots=True)
class Measured:
    """A plan, and what the machine was like when it was measured."""

    plan: ExecutionPlan
    others: float  # share of the cores' time that other processes used
    spread: float  # see spread_of
    cosine: float = 1.0  # the least one between its embeddings and a CPU's; 1.0 on a CPU

    @property
    def doubt(self) -> float:
        """How far it is from being relied on; confirmed up to 1."""
        return max(self.others / _MOST_OTHERS, self.spread / _MOST_SPREAD)

    @property
    def confirmed(self) -> bool:
        """Whether the machine was quiet enough."""
        return self.doubt <= 1.0


Run = Callable[[Mapping[str, Any]], object]
"""One run of a session on a feed."""


@dataclass(frozen=True, slots=True)
class Trial:
    """How one way did on a GPU.

    cosine: the least one between its embeddings and a CPU's. opening: seconds until it could run. others:
    share of the cores that other processes used. rounds: inputs a second, in some rounds, by inputs at once.
    """

    cosine: float
    opening: float
    others: float
    rounds: Mapping[int, Sequence[float]]


class TrialFailed(RuntimeError):
    """The way cannot be used here; the message says why."""

    code = "trial_failed"


def measure(
    usual: ExecutionPlan,
    batches: Sequence[int],
    open_run: Callable[[int], Run],
    feed: Callable[[int], Mapping[str, Any]],
) -> Measured:
    """The fastest plan on this CPU; what is usual, where nothing is clearly faster. A second or two.

    batches: to choose from, the usual one first. open_run(threads) opens a session. feed(n) is a batch of n.
    """
    cores = usual.alone
    # The usual one first: it is taken where nothing is clearly faster.
    runs = {cores: open_run(cores)}
    threads = 1
    while threads < cores:
        runs[threads] = open_run(threads)
        threads *= 2
    # Threads, inputs of a run, and runs beside each other.
    alone = {(threads, 1, 1): threads for threads in runs}
    beside = {
        (threads, n, cores // threads): (cores // threads, threads, n)
        for threads in sorted(runs)
        if threads <= _FEW_THREADS or threads == cores
        for n in batches
    }
    ways = [*alone, *beside]
    usage = Usage()
    rates: dict[tuple[int, int, int], list[float]] = {way: [] for way in ways}
    for threads, n, _ in ways:
        runs[threads](feed(n))
    # In turn, so that what disturbs the machine for a while disturbs all alike.
    for _, (threads, n, workers) in product(range(_ROUNDS), ways):
        rates[threads, n, workers].append(rate(runs[threads], feed(n), n, workers))
    best = {way: max(found) for way, found in rates.items()}
    found = Measured(usual, usage.others(), spread_of(list(rates.values())))
    clearly = _CLEARLY if found.confirmed else _CLEARLY_IN_DOUBT
    plan = ExecutionPlan(
        _best({threads: best[way] for way, threads in alone.items()}, clearly),
        *_best({chosen: best[way] for way, chosen in beside.items()}, clearly),
    )
    return replace(found, plan=plan)


def ways_on_gpu(usual: ExecutionPlan, halves: bool, images: bool) -> tuple[ExecutionPlan, ...]:
    """What is worth trying, the likely best first. halves: there is a graph in half precision."""
    return tuple(
        replace(usual, half=half, graphs=graphs, channels_last=channels_last)
        for half, graphs, channels_last in product(
            (True, False) if halves else (False,), (True, False), (False, True) if images else (False,)
        )
        # Half precision is what channels are laid out for.
        if half or not channels_last
    )


def measure_on_gpu(
    usual: ExecutionPlan,
    ways: Sequence[ExecutionPlan],
    batches: Sequence[int],
    try_out: Callable[[ExecutionPlan], Trial],
) -> Measured:
    """The fastest way on this GPU whose embeddings are those of a CPU. A minute or less.

    batches: inputs of one run that were tried, beside a single one. try_out(plan) raises TrialFailed. What is
    usual, in single precision, where every way that works gives other embeddings. Raises TrialFailed where
    none works.
    """
    found: dict[ExecutionPlan, float] = {}
    cosines: dict[ExecutionPlan, float] = {}
    rounds: list[Sequence[float]] = []
    others = 0.0
    failed: TrialFailed | None = None
    for way in ways:
        try:
            trial = try_out(way)
        except TrialFailed as error:
            # A network may have what no graph can capture.
            logger.info("a way to run a backbone cannot be used here, %s: %s", way, error)
            failed = error
            continue
        cosines[way], others = trial.cosine, max(others, trial.others)
        if not trial.cosine >= _MIN_COSINE:
            logger.warning("embeddings are others here, and it is not used: %s, cosine %s", way, trial.cosine)
            continue
        rounds += trial.rounds.values()
        rates = {count: max(some) for count, some in trial.rounds.items()}
        # The smallest that is about as fast: less waits, and less memory is bound.
        batch = min(count for count in batches if rates[count] * _CLEARLY >= max(rates.values()))
        # One input after the other counts as much as many at once.
        chosen = replace(way, batch=batch)
        found[chosen] = math.sqrt(rates[1] * rates[batch])
        cosines[chosen] = trial.cosine
    if not cosines and failed is not None:
        raise failed
    best = max(found, key=lambda plan: found[plan], default=usual)
    return Measured(best, others, spread_of(rounds) if rounds else 1.0, cosines.get(best, 1.0))


def spread_of(rounds: Sequence[Sequence[float]]) -> float:
    """By how much rounds lie below the best one of the same way: the median round, of the median way.

    rounds: the rates of each way, at least one each.
    """
    return median(1.0 - median(rates) / max(rates) for rates in rounds)


def rate(
    run: Callable[[T], object], feed: T, items: int, workers: int, seconds: float = _ROUND_SECONDS
) -> float:
    """Items a second by this number of threads."""

    def repeat(until: float) -> int:
        count = 0
        while not count or time.perf_counter() < until:
            run(feed)
            count += items
        return count

    with ThreadPoolExecutor(workers) as pool:
        begin = time.perf_counter()
        done = sum(pool.map(repeat, [begin + seconds] * workers))
        return done / (time.perf_counter() - begin)


def _best(rates: Mapping[K, float], clearly: float = _CLEARLY) -> K:
    """The fastest; the first where none is faster than it by such a factor."""
    first, best = next(iter(rates)), max(rates, key=lambda key: rates[key])
    return best if rates[best] > clearly * rates[first] else first


def is_quiet(seconds: float = _LOOK_SECONDS) -> bool:
    """Whether others leave the cores to this process, looking for so long."""
    usage = Usage()
    time.sleep(seconds)
    return usage.others() <= _MOST_OTHERS


def read_plan(export: Path, usual: ExecutionPlan, device: Device) -> Measured | None:
    """What was measured on this machine, if there is something that can be read."""
    try:
        kept = json.loads((export / PLAN_FILE).read_text())
        if kept["about"] != _about(usual, device):
            return None
        plan = ExecutionPlan(
            **{name: type(getattr(usual, name))(value) for name, value in kept["plan"].items()}
        )
        found = Measured(plan, float(kept["others"]), float(kept["spread"]), float(kept["cosine"]))
        return found if min(plan.alone, plan.workers, plan.beside, plan.batch) > 0 else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep_plan(export: Path, usual: ExecutionPlan, device: Device, measured: Measured) -> None:
    """Writes the plan beside the export; where that cannot be, the next start measures again."""
    content = json.dumps({"about": _about(usual, device), **asdict(measured)}, indent=2)
    scratch = export / f".{PLAN_FILE}.{os.getpid()}"
    try:
        scratch.write_text(content + "\n")
        scratch.replace(export / PLAN_FILE)
    except OSError as error:
        logger.info("how the backbone in %s runs best is not kept: %s", export, error)
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def _about(usual: ExecutionPlan, device: Device) -> dict[str, Any]:
    """What a plan depends on."""
    return {
        "format": _FORMAT,
        "onnxruntime": runtime_version(),
        "device": device,
        "threads": usual.alone,
        "processor": (gpu_name() if device == "cuda" else _processor()) or "unknown",
    }


def _processor() -> str | None:
    """What the kernel calls this machine's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
