"""Autotuning: the fastest plan on this machine, measured at the first start and stored beside the export.

A measurement on a busy machine is unreliable: it is stored as unconfirmed until one on a quiet machine
replaces it.
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

from models.errors import DomainError
from models.runtime.driver import gpu_name
from models.runtime.session import Device, runtime_version
from models.runtime.usage import Usage
from models.spec import Kind

logger = logging.getLogger("topwork")

K = TypeVar("K")
T = TypeVar("T")

PLAN_FILE = "plan.json"
_FORMAT = 6
# Batch sizes to try on a CPU, the usual one first. More images at once take more memory and gain nothing.
BATCHES: Mapping[Kind, Sequence[int]] = {"image": (2, 1, 4), "text": (32, 1, 8)}
BATCHES_ON_GPU: Mapping[Kind, Sequence[int]] = {
    "image": (8, 32, 64, 128, 256),
    "text": (32, 128, 256, 512, 1024),
}
_MIN_COSINE = 0.9999  # minimum cosine between embeddings of a plan on a GPU and float32 ones of a CPU
_FEW_THREADS = 4  # maximum threads per concurrent run, unless a single run uses all threads
# Factors by which a choice must be faster than the usual one: smaller gains may be noise, of which a busy
# machine has more.
_CLEARLY, _CLEARLY_IN_DOUBT = 1.05, 2.0
_ROUNDS = 5
_ROUND_SECONDS = 0.02
# A measurement above either limit is unconfirmed.
_MOST_OTHERS = 0.1  # share of the cores' time used by other processes
_MOST_SPREAD = 0.2  # see spread_of
_LOOK_SECONDS = 0.2  # time to observe whether other processes use the cores


@dataclass(frozen=True, slots=True)
class ExecutionPlan:
    """How a backbone is run. On a GPU, workers only prepare inputs; `alone` and `beside` have no effect."""

    alone: int  # threads of a run that has the machine to itself
    workers: int  # concurrent runs when inputs wait
    beside: int  # threads of each concurrent run
    batch: int  # maximum inputs per run
    half: bool = False  # compute in float16 (GPU)
    graphs: bool = False  # replay CUDA graphs (GPU)
    channels_last: bool = False  # NHWC convolutions (GPU)

    @classmethod
    def usual(cls, kind: Kind, device: Device, threads: int) -> ExecutionPlan:
        """The default plan, without measuring.

        On a CPU, batching gains little for convolutions (activations no longer fit the cache) and much for
        short texts.
        """
        batch = BATCHES[kind][0] if device == "cpu" else {"image": 32, "text": 128}[kind]
        return cls(threads, threads, 1, batch)


@dataclass(frozen=True, slots=True)
class MeasuredPlan:
    """A measured plan, and the state of the machine during the measurement."""

    plan: ExecutionPlan
    others: float  # share of the cores' time used by other processes
    spread: float  # see spread_of
    cosine: float = 1.0  # lowest one between the plan's embeddings and a CPU's; 1.0 on a CPU

    @property
    def doubt(self) -> float:
        """How unreliable the measurement is; it is confirmed up to 1."""
        return max(self.others / _MOST_OTHERS, self.spread / _MOST_SPREAD)

    @property
    def confirmed(self) -> bool:
        """Whether the machine was quiet enough for a reliable measurement."""
        return self.doubt <= 1.0


Run = Callable[[Mapping[str, Any]], object]
"""One run of a session on a feed."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The result of trying one plan on a GPU."""

    cosine: float  # lowest one between the plan's embeddings and a CPU's
    opening: float  # seconds until the backbone was ready
    others: float  # share of the cores' time used by other processes
    rounds: Mapping[int, Sequence[float]]  # inputs per second in each round, by batch size


class TrialFailed(DomainError):
    """The plan cannot be used here; the message says why."""

    code = "trial_failed"


def measure(
    usual: ExecutionPlan,
    batches: Sequence[int],
    open_run: Callable[[int], Run],
    feed: Callable[[int], Mapping[str, Any]],
) -> MeasuredPlan:
    """Measure the fastest plan on this CPU, in a second or two; `usual` unless another is clearly faster.

    `batches`: sizes to choose from, the usual one first. `open_run(threads)` opens a session. `feed(n)`
    returns a batch of n.
    """
    cores = usual.alone
    # The usual number of threads goes first, since _best prefers the first choice.
    runs = {cores: open_run(cores)}
    threads = 1
    while threads < cores:
        runs[threads] = open_run(threads)
        threads *= 2
    # The keys are (threads per run, inputs per run, concurrent runs).
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
    # The ways are measured in turn, so that a temporary disturbance affects all of them alike.
    for _, (threads, n, workers) in product(range(_ROUNDS), ways):
        rates[threads, n, workers].append(rate(runs[threads], feed(n), n, workers))
    best = {way: max(found) for way, found in rates.items()}
    found = MeasuredPlan(usual, usage.others(), spread_of(list(rates.values())))
    clearly = _CLEARLY if found.confirmed else _CLEARLY_IN_DOUBT
    plan = ExecutionPlan(
        _best({threads: best[way] for way, threads in alone.items()}, clearly),
        *_best({chosen: best[way] for way, chosen in beside.items()}, clearly),
    )
    return replace(found, plan=plan)


def ways_on_gpu(usual: ExecutionPlan, halves: bool, images: bool) -> tuple[ExecutionPlan, ...]:
    """The plans worth trying, likely best first. `halves`: there is a graph in half precision."""
    return tuple(
        replace(usual, half=half, graphs=graphs, channels_last=channels_last)
        for half, graphs, channels_last in product(
            (True, False) if halves else (False,), (True, False), (False, True) if images else (False,)
        )
        # The channels_last layout only helps in half precision.
        if half or not channels_last
    )


def measure_on_gpu(
    usual: ExecutionPlan,
    ways: Sequence[ExecutionPlan],
    batches: Sequence[int],
    try_out: Callable[[ExecutionPlan], Trial],
) -> MeasuredPlan:
    """Find the fastest plan on this GPU whose embeddings equal a CPU's, in a minute or less.

    `batches`: sizes that were tried besides 1. `try_out(plan)` may raise TrialFailed. Returns `usual`, in
    single precision, if all working plans give other embeddings. Raises TrialFailed if none works.
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
            # Some networks contain operations that CUDA graphs cannot capture.
            logger.info("a way to run a backbone cannot be used here, %s: %s", way, error)
            failed = error
            continue
        cosines[way], others = trial.cosine, max(others, trial.others)
        if not trial.cosine >= _MIN_COSINE:
            logger.warning("embeddings are others here, and it is not used: %s, cosine %s", way, trial.cosine)
            continue
        rounds += trial.rounds.values()
        rates = {count: max(some) for count, some in trial.rounds.items()}
        # The smallest batch that is about as fast is best: shorter waits, and less memory.
        fastest = max(rates[count] for count in batches)
        batch = min(count for count in batches if rates[count] * _CLEARLY >= fastest)
        # The speed of single inputs counts as much as that of batches.
        chosen = replace(way, batch=batch)
        found[chosen] = math.sqrt(rates[1] * rates[batch])
        cosines[chosen] = trial.cosine
    if not cosines and failed is not None:
        raise failed
    best = max(found, key=lambda plan: found[plan], default=usual)
    return MeasuredPlan(best, others, spread_of(rounds) if rounds else 1.0, cosines.get(best, 1.0))


def spread_of(rounds: Sequence[Sequence[float]]) -> float:
    """The relative gap between the median and the best round of a way, as the median over all ways.

    `rounds`: the rates of each way, at least one each.
    """
    return median(1.0 - median(rates) / max(rates) for rates in rounds)


def rate(
    run: Callable[[T], object], feed: T, items: int, workers: int, seconds: float = _ROUND_SECONDS
) -> float:
    """Measure the items per second that `workers` threads run."""

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
    """The key with the highest rate; the first key unless that is faster by the factor `clearly`."""
    first, best = next(iter(rates)), max(rates, key=lambda key: rates[key])
    return best if rates[best] > clearly * rates[first] else first


def is_quiet(seconds: float = _LOOK_SECONDS) -> bool:
    """Observe for `seconds` whether other processes leave the cores to this one."""
    usage = Usage()
    time.sleep(seconds)
    return usage.others() <= _MOST_OTHERS


def read_plan(export: Path, usual: ExecutionPlan, device: Device) -> MeasuredPlan | None:
    """Read the measurement stored for this machine; None if there is none that can be used."""
    try:
        kept = json.loads((export / PLAN_FILE).read_text())
        if kept["about"] != _about(usual, device):
            return None
        plan = ExecutionPlan(
            **{name: type(getattr(usual, name))(value) for name, value in kept["plan"].items()}
        )
        found = MeasuredPlan(plan, float(kept["others"]), float(kept["spread"]), float(kept["cosine"]))
        return found if min(plan.alone, plan.workers, plan.beside, plan.batch) > 0 else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep_plan(export: Path, usual: ExecutionPlan, device: Device, measured: MeasuredPlan) -> None:
    """Store the plan beside the export. If that fails, the next start measures again."""
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
    """Everything that a plan depends on."""
    return {
        "format": _FORMAT,
        "onnxruntime": runtime_version(),
        "device": device,
        "threads": usual.alone,
        "processor": (gpu_name() if device == "cuda" else _processor()) or "unknown",
    }


def _processor() -> str | None:
    """The kernel's name of this machine's processor, None if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
