"""Scores reported where examples are near copies of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.examples.target import Task
from adapters.probe.fit import fit
from benchmarks.honesty import sets
from benchmarks.honesty.bench import OPTIMISM, TASKS, Bench, show_claims
from benchmarks.honesty.scores import Claim, Claims, Known, Rows, chance_score, claim, true_score
from models.arrays import Floats

_TESTED = 2_000
_COIN = ("heads", "tails")


@dataclass(frozen=True, slots=True)
class Copied:
    """A hundred examples, a share of them copies. flipped: targets drawn without a look at the inputs."""

    task: Task
    set: str
    share: float
    flipped: bool

    @property
    def name(self) -> str:
        """As the table says it."""
        return f"{self.set}, {'coin flips' if self.flipped else 'as they are'}"


_EXAMPLES = 100
# With more labels, a hundred examples of which half are copies make cross-validation pessimistic.
_LABELS = 5


def copied_cases() -> list[Copied]:
    """Every set and share, with real and with drawn targets."""
    tasks: dict[Task, tuple[str, ...]] = {
        "classification": ("opinions-products", "trec-coarse", "tux-paint"),
        "multilabel": (sets.TOPICS,),
        "regression": ("opinions-products",),
    }
    return [
        Copied(task, name, share, flipped)
        for task, names in tasks.items()
        for name in names
        for flipped in (True, False)
        for share in (0.1, 0.3, 0.5)
    ]


def copied(case: Copied, seeds: Sequence[int], folder: Path) -> list[Claim]:
    """A claim for every seed."""
    known = sets.known(case.task, sets.THREE_TAGS if case.task == "multilabel" else case.set, folder)
    copies = sets.copies(case.set, folder).rows
    return [planted(known, copies, case.share, case.flipped, seed) for seed in seeds]


def planted(known: Known, copies: Floats, share: float, flipped: bool, seed: int) -> Claim:
    """The claim for examples of which this share are copies of others.

    copies: float32 (kinds, m, dim), of the first m inputs. A copy has the target of its original, and a
    digest of its own. flipped: targets are drawn without a look at the inputs.
    """
    generator = np.random.default_rng((seed, round(100 * share)))
    own = _flipped(known, generator) if flipped else _common(known)
    m = copies.shape[1]
    count = round(_EXAMPLES * share)
    originals = generator.permutation(own.usable[own.usable < m])[: _EXAMPLES - count]
    doubled = originals[:count]
    kinds = generator.integers(0, len(copies), count)
    examples = replace(
        own.known,
        rows=np.concatenate([known.rows[originals], copies[kinds, doubled]]),
        targets=np.concatenate([own.known.targets[originals], own.known.targets[doubled]]),
    )
    fitted = fit(examples.dataset(np.arange(_EXAMPLES)))
    rest = np.setdiff1d(own.usable, originals)[-_TESTED:]
    if flipped:
        true = chance_score(fitted.head, known.rows[rest], dict.fromkeys(_COIN, 0.5), 0.0, 1.0)
    else:
        true = true_score(known, fitted.head, rest)
    return claim(fitted, known.task, true)


@dataclass(frozen=True, slots=True)
class _Usable:
    known: Known
    usable: Rows


def _common(known: Known) -> _Usable:
    """The inputs of the most frequent labels, as they are."""
    rows = np.arange(len(known.rows))
    if known.task == "classification":
        names, counts = np.unique(known.targets, return_counts=True)
        rows = rows[np.isin(known.targets, names[np.argsort(-counts, kind="stable")][:_LABELS])]
    return _Usable(known, rows)


def _flipped(known: Known, generator: np.random.Generator) -> _Usable:
    """Two labels, two tags, or normal numbers."""
    n = len(known.rows)
    targets: NDArray[Any] = generator.standard_normal(n)
    if known.task == "multilabel":
        targets = generator.random((n, len(_COIN))) < 0.5
    elif known.task == "classification":
        targets = np.array(_COIN)[generator.integers(0, len(_COIN), n)]
    return _Usable(replace(known, targets=targets, names=_COIN), np.arange(n))


def tell_copies(bench: Bench) -> None:
    """Tables and targets of near copies."""
    found = bench.over(bench.on_sets(copied), copied_cases(), 200)
    rows = [
        ((case.task, case.name, f"{_EXAMPLES}, {case.share:.0%} copies"), [claims])
        for case, claims in found.items()
    ]
    show_claims(bench, "copies", "Near copies among the examples", rows)
    for task in TASKS:
        for flipped in (True, False):
            gaps = [
                abs(Claims(tuple(claims)).optimism)
                for case, claims in found.items()
                if case.task == task and case.flipped == flipped
            ]
            what = "coin flips" if flipped else "real targets"
            name = f"copies, {task}, {what}: reported beside true, the furthest"
            bench.report.expect(name, max(gaps), "<=", OPTIMISM)
