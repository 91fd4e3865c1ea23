"""Reports beside the truth: scores, intervals, confidence, abstention, promotion.

python -m benchmarks.honesty.__main__ [part ...]     # all parts by default

Heads are fitted by adapters.probe.fit, as the service fits them, on embeddings that are kept on disk. The
truth is known because targets are drawn without a look at the inputs, or because the rest of a real set is
there to be tested on.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from benchmarks.harness.options import asked
from benchmarks.harness.report import Report
from benchmarks.honesty import sets
from benchmarks.honesty.answers import tell_shots, tell_tags
from benchmarks.honesty.bench import Bench
from benchmarks.honesty.copies import tell_copies
from benchmarks.honesty.growth import tell_few, tell_growth, tell_ratings
from benchmarks.honesty.live import tell_promotion
from benchmarks.honesty.noise import tell_noise
from benchmarks.honesty.real import tell_corrections, tell_rare, tell_real

_PROCESSES = 2
# Splits of any part at most; each part has a number of its own, and says it.
_SPLITS = 200

PARTS: Mapping[str, Callable[[Bench], None]] = {
    "noise": tell_noise,
    "real": tell_real,
    "rare": tell_rare,
    "corrections": tell_corrections,
    "copies": tell_copies,
    "shots": tell_shots,
    "tags": tell_tags,
    "growth": tell_growth,
    "few": tell_few,
    "ratings": tell_ratings,
    "promotion": tell_promotion,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the named parts and writes benchmarks/results/honesty.md and .json; 1 if a target is missed."""
    options = asked(__doc__, PARTS, arguments, seeds=_SPLITS)
    report = Report("honesty", "Honesty")
    sets.prepare(sets.CLASSIFIED, sets.COPIED, options.data)
    with ProcessPoolExecutor(
        _PROCESSES,
        multiprocessing.get_context("spawn"),
        initializer=threadpool_limits,
        initargs=(1,),
    ) as executor:
        bench = Bench(report, executor, options.data, options.seeds)
        for part in options.parts:
            begun = time.monotonic()
            PARTS[part](bench)
            print(f"{part}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
