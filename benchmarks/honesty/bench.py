"""Shared by the parts of the honesty benchmark: the run, promised limits, and tables of claims."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from adapters.examples.target import Task
from benchmarks.harness.report import Report, table
from benchmarks.honesty.scores import Claim, Claims, mean

Case = TypeVar("Case", bound=Hashable)
Found = TypeVar("Found")

TASKS: tuple[Task, ...] = ("classification", "multilabel", "regression")

COVERAGE = 0.93  # share of 95 % intervals that hold the truth
OPTIMISM = 0.02  # reported minus true score
WANTED_ACCURACY = 0.95  # of what is answered, as ProbeConfig asks by default
SURE = 0.999  # confidence from which hardly any answer may be wrong
SURE_WRONG = 0.01  # share of wrong answers among those
_SEEDS_TOGETHER = 10


@dataclass(frozen=True, slots=True)
class Bench:
    """The run of a part and its report. most: an upper bound of its splits."""

    report: Report
    executor: Executor
    folder: Path
    most: int

    def over(
        self, run: Callable[..., Sequence[Found]], cases: Iterable[Case], splits: int
    ) -> dict[Case, list[Found]]:
        """Findings of `run` for each case and seed, in the order of the seeds."""
        splits = min(splits, self.most)
        found: dict[Case, list[Future[Sequence[Found]]]] = {}
        for case in cases:
            found[case] = [
                self.executor.submit(run, case, range(begin, min(begin + _SEEDS_TOGETHER, splits)))
                for begin in range(0, splits, _SEEDS_TOGETHER)
            ]
        return {
            case: [one for future in futures for one in future.result()] for case, futures in found.items()
        }

    def on_sets(self, run: Callable[..., Sequence[Found]]) -> Callable[..., Sequence[Found]]:
        """The same function, told where the sets are."""
        return functools.partial(run, folder=self.folder)

    def show(
        self, part: str, heading: str, head: Sequence[str], rows: Sequence[Sequence[str | float]]
    ) -> None:
        """Adds a table to the report, and its numbers to the data of the part."""
        texts = [[_text(*cell) for cell in zip(head, row, strict=True)] for row in rows]
        self.report.add(heading, table(head, texts))
        self.report.data[part] = [
            {name: None if value != value else value for name, value in zip(head, row, strict=True)}
            for row in rows
        ]


def splits_of(found: Mapping[Case, Sequence[Found]]) -> int:
    """How many splits each case has."""
    return len(next(iter(found.values())))


def _text(column: str, value: str | float) -> str:
    """Differences with their sign, and a dash for what was not measured."""
    if not isinstance(value, float):
        return str(value)
    return "–" if math.isnan(value) else f"{value:{'+.3f' if '−' in column else '.3f'}}"


def show_claims(
    bench: Bench, part: str, heading: str, rows: Iterable[tuple[Sequence[str], Sequence[Sequence[Claim]]]]
) -> None:
    """A table of claims: what each row is about, and the claims of all its cells.

    Cells are shown together, but for the least share of intervals that hold.
    """
    shown: list[list[str | float]] = []
    for about, cells in rows:
        each = [Claims(tuple(cell)) for cell in cells]
        whole = Claims(tuple(one for cell in cells for one in cell))
        least = min((one.coverage for one in each if one.measured), default=math.nan)
        shown.append(
            [
                *about,
                len(whole.claims),
                len(whole.measured),
                whole.reported,
                whole.true,
                whole.optimism,
                whole.coverage,
                least,
                whole.width,
            ]
        )
    head = ["task", "targets", "examples", "splits", "measured", "reported", "true", "reported − true"]
    bench.show(part, heading, [*head, "intervals that hold", "the least", "their width"], shown)


def expect_claims(bench: Bench, part: str, task: Task, cells: Iterable[Sequence[Claim]]) -> None:
    """Targets on the claims of one task."""
    each = [Claims(tuple(cell)) for cell in cells]
    each = [one for one in each if one.measured]
    coverages = [one.coverage for one in each]
    name = f"{part}, {task}: intervals that hold the truth"
    bench.report.expect(name, mean(coverages), ">=", COVERAGE)
    bench.report.expect(f"{name}, least of {len(each)} cells", min(coverages), ">=", COVERAGE)
    optimism = mean([one.optimism for one in each])
    bench.report.expect(f"{part}, {task}: reported − true", optimism, "<=", OPTIMISM)


def expect_sure(bench: Bench, part: str, sure: int, wrong: int) -> None:
    """The target on answers with a confidence above SURE."""
    bench.report.expect(f"{part}: wrong with confidence above {SURE}", wrong / max(sure, 1), "<=", SURE_WRONG)
