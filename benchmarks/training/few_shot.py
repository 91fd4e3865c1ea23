"""Accuracy of heads that learn from few examples, ours beside others, on the same embeddings.

Each run draws up to sixteen examples of every label and about a thousand other inputs, as many of every label
as far as it goes; a head learns from the first k of each label. Labels with few samples give at most half of
them as examples. With 1,000 examples, they and the inputs are drawn as they come.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from adapters.probe.label_names import LabelNames
from benchmarks.data import datasets
from benchmarks.data.embeddings import BACKBONES, EmbeddedSet, embedded
from benchmarks.data.sources import SOURCES
from benchmarks.data.spoken_names import KINDS, MISLEADING, OPAQUE, SWAPPED, TRUE, names_for
from benchmarks.harness.options import asked
from benchmarks.harness.report import Report, table
from benchmarks.training.heads import HEADS, NAMED, NAMES_ALONE, OURS, heads_with_names

SHOTS = (1, 2, 4, 8, 16)
MANY = 1_000  # examples in all; with them, tests are as many again
_MANY_SEEDS = 3
_TESTED = 1_000
_TESTED_AT_LEAST = 500  # after MANY examples
_FROM_EACH_SET = 4_000
_PROCESSES = 2
_SEEDS = 10
# Fewer examples than this leave too much to chance for a promise about each single set.
_PROMISED_FROM = 4
BEHIND = 0.5  # points under the best other head of a cell

Rows = NDArray[np.int64]
Accuracies = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Cell:
    """A set and a number of examples: of each label, or MANY in all."""

    set: str
    examples: int


@dataclass(frozen=True, slots=True)
class Run:
    """Accuracy and seconds of each head on one draw of a cell."""

    accuracy: Mapping[str, float]
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Margin:
    """Ours beside the best other head of a cell, in points."""

    cell: Cell
    best: str
    points: float
    error: float  # standard error of the mean difference; NaN of a single run


def drawn(data: EmbeddedSet, examples: int, seed: int) -> tuple[Rows, Rows]:
    """Return the rows to learn from and to test on; the tests of one seed are the same for every k."""
    order = np.random.default_rng(seed).permutation(len(data.rows))
    if examples == MANY:
        learned, rest = order[:MANY], order[MANY:]
        return learned, rest[np.isin(data.labels[rest], data.labels[learned])][:_TESTED]
    own = [order[data.labels[order] == label] for label in np.unique(data.labels)]
    own = [rows for rows in own if len(rows) > 1]
    most = [rows[: min(max(SHOTS), len(rows) // 2)] for rows in own]
    share = -(-_TESTED // len(own))
    tested = [rows[len(first) : len(first) + share] for rows, first in zip(own, most, strict=True)]
    return np.concatenate([rows[:examples] for rows in most]), np.concatenate(tested)


def measured(cell: Cell, seed: int, folder: Path) -> Run:
    """Fit and test every head on one draw."""
    data = _data(cell.set, folder)
    learned, tested = drawn(data, cell.examples, seed)
    labels = data.labels[learned]
    known = set(labels.tolist())
    said = {kind: _known_names(names, known) for kind, names in _names(cell.set, folder).items()}
    heads = {**HEADS, **heads_with_names(said)}
    accuracy, seconds = {}, {}
    for name, head in heads.items():
        begun = time.perf_counter()
        answers = head(data.rows[learned], labels, data.rows[tested])
        seconds[name] = time.perf_counter() - begun
        accuracy[name] = float((answers == data.labels[tested]).mean())
    return Run(accuracy, seconds)


@functools.cache
def _data(name: str, folder: Path) -> EmbeddedSet:
    return embedded(name, folder, most=_FROM_EACH_SET, backbone=BACKBONES[SOURCES[name].kind])


@functools.cache
def _names(name: str, folder: Path) -> Mapping[str, LabelNames]:
    """Return what names of each kind say of the labels."""
    labels = np.unique(_data(name, folder).labels).tolist()
    return {kind: names_for(name, SOURCES[name].kind, labels, folder, kind) for kind in KINDS}


def _known_names(names: LabelNames, labels: Set[str]) -> LabelNames:
    """Return the names of these labels: a draw may lack the rarest."""
    return replace(names, directions={one: said for one, said in names.directions.items() if one in labels})


def prepare(names: Sequence[str], folder: Path) -> None:
    """Embed what is not kept in the folder yet: the sets, and the names of their labels."""
    for name in names:
        _names(name, folder)


def cells_of(name: str, folder: Path) -> list[Cell]:
    """The cells of a set; with MANY examples only where enough is left to be tested on."""
    enough = len(_data(name, folder).rows) >= MANY + _TESTED_AT_LEAST
    return [Cell(name, examples) for examples in (*SHOTS, *([MANY] if enough else []))]


def _seeds(cell: Cell, seeds: int) -> int:
    return min(seeds, _MANY_SEEDS) if cell.examples == MANY else seeds


def ranks(runs: Mapping[Cell, Sequence[Run]]) -> dict[str, float]:
    """The mean rank over all cells of each head that learns from examples alone; 1 is best."""
    each = [rankdata([-_mean(found, head) for head in HEADS]) for found in runs.values()]
    return dict(zip(HEADS, np.mean(each, axis=0).tolist(), strict=True))


def margin(cell: Cell, runs: Sequence[Run]) -> Margin:
    """Ours beside the best other head of the cell, by the mean over its runs."""
    best = max((head for head in HEADS if head != OURS), key=lambda head: _mean(runs, head))
    differences = 100.0 * (_values(runs, OURS) - _values(runs, best))
    error = differences.std(ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else np.nan
    return Margin(cell, best, float(differences.mean()), float(error))


def _values(runs: Sequence[Run], head: str) -> Accuracies:
    return np.array([run.accuracy[head] for run in runs])


def _mean(runs: Sequence[Run], head: str) -> float:
    return float(_values(runs, head).mean())


def _column(examples: int) -> str:
    return f"{examples:,} in all" if examples == MANY else str(examples)


def _rows(runs: Mapping[Cell, Sequence[Run]], heads: Sequence[str]) -> list[list[str]]:
    """A row for each head: its mean accuracy over the sets, for every number of examples."""
    sizes = sorted({cell.examples for cell in runs})
    rows = []
    for head in heads:
        row = [head]
        for size in sizes:
            means = [
                _mean(found, head)
                for cell, found in runs.items()
                if cell.examples == size and head in found[0].accuracy
            ]
            row.append(f"{np.mean(means):.3f}" if means else "")
        rows.append(row)
    return rows


def _told(report: Report, runs: Mapping[Cell, Sequence[Run]]) -> None:
    """Add the tables and the targets."""
    columns = [_column(size) for size in sorted({cell.examples for cell in runs})]
    mean_ranks = ranks(runs)
    seconds = {head: sum(run.seconds[head] for found in runs.values() for run in found) for head in HEADS}
    rows = [
        [*row, f"{mean_ranks[row[0]]:.2f}", f"{seconds[row[0]]:.0f}"] for row in _rows(runs, tuple(HEADS))
    ]
    count = len({cell.set for cell in runs})
    report.add(
        f"Mean accuracy over {count} sets, by examples of each label",
        table(["head", *columns, "mean rank", "seconds in all"], rows),
    )
    report.add(
        "With names of the labels", table(["", *columns], _rows(runs, (OURS, NAMES_ALONE, *NAMED.values())))
    )
    for name in dict.fromkeys(cell.set for cell in runs):
        own = {cell: found for cell, found in runs.items() if cell.set == name}
        shown = [_column(cell.examples) for cell in own]
        heads = tuple(next(iter(own.values()))[0].accuracy)
        report.add(name, table(["head", *shown], _rows(own, heads)))
    _expected(report, runs, mean_ranks)
    _expected_of_names(report, runs)


def _expected_of_names(report: Report, runs: Mapping[Cell, Sequence[Run]]) -> None:
    """Add the targets of names, and a table of each set's gain."""
    sizes = sorted({cell.examples for cell in runs})
    named = NAMED[TRUE]
    gains = {cell: 100.0 * (_mean(found, named) - _mean(found, OURS)) for cell, found in runs.items()}
    over = {cell: 100.0 * (_mean(found, named) - _mean(found, NAMES_ALONE)) for cell, found in runs.items()}
    sets = list(dict.fromkeys(cell.set for cell in runs))
    lines = [
        [name, *(f"{gains[Cell(name, size)]:+.1f}" if Cell(name, size) in gains else "" for size in sizes)]
        for name in sets
    ]
    report.add("Points that true names add", table(["set", *map(_column, sizes)], lines))
    for size in sizes:
        own = [cell for cell in runs if cell.examples == size]
        gain = float(np.mean([gains[cell] for cell in own]))
        if size == 1:
            report.expect("true names add at 1 example, mean", gain, ">=", 5.0, " points")
        if size <= 2:
            worst = min(own, key=lambda cell: over[cell])
            report.expect(
                f"with names over names alone at {size}, least ({worst.set})",
                over[worst],
                ">=",
                0.0,
                " points",
            )
        if size == MANY:
            report.expect("true names add at 1,000, mean", gain, ">=", -0.1, " points")
        for kind in (SWAPPED, OPAQUE, MISLEADING):
            lost = float(
                np.mean([100.0 * (_mean(runs[cell], OURS) - _mean(runs[cell], NAMED[kind])) for cell in own])
            )
            report.expect(f"{kind} names cost at {_column(size)}, mean", lost, "<=", 1.0, " points")


def _expected(report: Report, runs: Mapping[Cell, Sequence[Run]], mean_ranks: Mapping[str, float]) -> None:
    others = {head: rank for head, rank in mean_ranks.items() if head != OURS}
    best = min(others, key=lambda head: others[head])
    report.expect(f"mean rank, of {best} at most", mean_ranks[OURS], "<=", others[best])
    margins = [margin(cell, found) for cell, found in runs.items() if cell.examples >= _PROMISED_FROM]
    missed = sorted((one for one in margins if one.points < -BEHIND), key=lambda one: one.points)
    if missed:
        lines = [
            [one.cell.set, _column(one.cell.examples), one.best, f"{one.points:+.2f}", f"{one.error:.2f}"]
            for one in missed
        ]
        head = ["set", "examples", "best head", "points ahead", "standard error"]
        report.add(
            f"More than {BEHIND} points behind: {len(missed)} of {len(margins)} cells", table(head, lines)
        )
    for one in missed:
        report.expect(f"{one.cell.set}, {_column(one.cell.examples)}: ahead of {one.best}", one.points, ">=",
                      -BEHIND, " points")  # fmt: skip
    if margins and not missed:
        report.expect(
            "least ahead of the best other head", min(one.points for one in margins), ">=", -BEHIND, " points"
        )
    report.data["mean_ranks"] = mean_ranks
    report.data["cells"] = [
        {
            "set": cell.set,
            "examples": cell.examples,
            "accuracy": {head: _values(found, head).tolist() for head in found[0].accuracy},
        }
        for cell, found in runs.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named sets and write benchmarks/results/few-shot.md and .json; 1 if a target is missed."""
    options = asked(__doc__, datasets.NAMES, arguments, seeds=_SEEDS)
    report = Report("few-shot", "Few examples")
    prepare(options.parts, options.data)
    cells = [cell for name in options.parts for cell in cells_of(name, options.data)]
    with ProcessPoolExecutor(
        _PROCESSES, multiprocessing.get_context("spawn"), initializer=threadpool_limits, initargs=(1,)
    ) as executor:
        pending = {
            cell: [
                executor.submit(measured, cell, seed, options.data)
                for seed in range(_seeds(cell, options.seeds))
            ]
            for cell in cells
        }
        runs = {}
        for cell, found in pending.items():
            runs[cell] = [one.result() for one in found]
            beside = margin(cell, runs[cell])
            print(
                f"{cell.set}, {_column(cell.examples)}: {beside.points:+.2f} points to {beside.best}",
                flush=True,
            )
    _told(report, runs)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
