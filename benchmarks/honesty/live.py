"""Promotion, live: adapters that grow by right and by wrong examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters.examples.target import Task
from benchmarks.honesty import sets
from benchmarks.honesty.bench import Bench, splits_of
from benchmarks.honesty.promotion import Inputs, Plan, Run, run
from benchmarks.honesty.scores import Known, mean

# Promised limits.
_FALL = 0.03  # score of the live version under that of the first
_HELD = {0.6: 0.90, 0.3: 0.75}  # share of wrong labels: share of runs that fall no deeper
_WITHHELD_RUNS = 0.05  # share of runs of right examples in which any version is withheld
_BETTER_WITHHELD = 0.02  # share of better versions that are withheld
_LABELS = 5  # of topics
_TESTED = 1_000


@dataclass(frozen=True, slots=True)
class Appended:
    """An adapter of a hundred examples, and twenty appends of ten with this share of wrong targets."""

    task: Task
    set: str
    wrong: float


_SETS: tuple[tuple[Task, str], ...] = (
    ("classification", sets.OPINIONS[0]),
    ("classification", sets.TOPICS),
    ("multilabel", sets.ALL_TAGS),
    ("regression", sets.OPINIONS[0]),
)
APPENDED = tuple(Appended(task, name, wrong) for task, name in _SETS for wrong in (*_HELD, 0.0))


def promoted(case: Appended, seeds: Sequence[int], folder: Path) -> list[Run]:
    """A run for each seed."""
    known = sets.known(case.task, case.set, folder)
    found = []
    for seed in seeds:
        inputs = _inputs(known, case, seed)
        tested = min(_TESTED, len(inputs.targets) // 2)
        found.append(run(inputs, Plan(wrong=case.wrong, tested=tested), seed))
    return found


def _inputs(known: Known, case: Appended, seed: int) -> Inputs:
    """All inputs of the set; of topics those of a few labels, other ones for every seed."""
    rows = np.arange(len(known.rows))
    if case.task == "classification" and case.set == sets.TOPICS:
        some = np.random.default_rng(seed).choice(np.unique(known.targets), _LABELS, replace=False)
        rows = rows[np.isin(known.targets, some)]
    data = known.dataset(rows)
    return Inputs(case.task, data.embeddings, data.targets, data.digests)


def tell_promotion(bench: Bench) -> None:
    """Tables and targets of promotion."""
    found = bench.over(bench.on_sets(promoted), APPENDED, 40)
    rows: list[list[str | float]] = []
    for case, runs in found.items():
        rows.append(
            [
                case.task,
                case.set,
                case.wrong,
                mean([one.scores[0] for one in runs]),
                mean([one.scores[-1] for one in runs]),
                mean([one.newest[-1] for one in runs]),
                mean([one.scores[-1] >= one.scores[0] - _FALL for one in runs]),
                mean([one.withheld for one in runs]),
                mean([one.withheld > 0 for one in runs]),
            ]
        )
    head = ["task", "set", "wrong", "score at first", "at last", "of the newest version"]
    head += [f"runs that fall {_FALL:.0%} at most", "withheld of 20", "runs with any withheld"]
    heading = f"Live versions while 20 times 10 examples are appended to 100; {splits_of(found)} runs"
    bench.show("promotion", heading, head, rows)
    expect = bench.report.expect
    for wrong, promised in _HELD.items():
        runs = [one for case, each in found.items() if case.wrong == wrong for one in each]
        held = mean([one.scores[-1] >= one.scores[0] - _FALL for one in runs])
        expect(f"promotion, {wrong:.0%} wrong: runs that fall {_FALL:.0%} at most", held, ">=", promised)
    clean = [one for case, each in found.items() if not case.wrong for one in each]
    expect(
        "promotion, all right: runs with any withheld",
        mean([one.withheld > 0 for one in clean]),
        "<=",
        _WITHHELD_RUNS,
    )
    better = [
        not decision.promote
        for one in clean
        for live, newest, decision in zip(one.scores, one.newest[1:], one.decisions, strict=False)
        if newest > live
    ]
    expect("promotion, all right: better versions withheld", mean(better), "<=", _BETTER_WITHHELD)
