"""Scores reported on targets that nothing can be learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.examples.target import Task
from adapters.probe.fit import OneLabel, fit
from benchmarks.honesty.bench import TASKS, Bench, expect_claims, show_claims
from benchmarks.honesty.scores import Claim, Known, chance_score, claim

SIZES = (10, 20, 50, 200)
_DIMS = (16, 384, 1_280)
_LABEL_COUNTS = (2, 5, 10)
_TAG_SHARE = 0.3
_POOL = 1_000  # inputs to answer; what is drawn for them is integrated out


@dataclass(frozen=True, slots=True)
class Noise:
    """Targets drawn without a look at the inputs. shares: of labels, or of each tag alone; () for numbers."""

    task: Task
    n: int
    dim: int
    shares: tuple[float, ...]

    @property
    def name(self) -> str:
        """As the table says it."""
        if self.task == "regression":
            return "numbers"
        if self.task == "multilabel":
            return f"{len(self.shares)} tags at {self.shares[0]:.0%}"
        even = len(set(self.shares)) == 1
        return f"{len(self.shares)} labels" + ("" if even else f", {self.shares[0]:.0%} the first")


def noises() -> list[Noise]:
    """Every kind of noise."""
    shares: dict[Task, list[tuple[float, ...]]] = {
        "classification": [(1.0 / count,) * count for count in _LABEL_COUNTS] + [(0.8, 0.2)],
        "multilabel": [(_TAG_SHARE,) * count for count in _LABEL_COUNTS] + [(0.05,) * 10],
        "regression": [()],
    }
    return [
        Noise(task, n, dim, some)
        for task, kinds in shares.items()
        for some in kinds
        for dim in _DIMS
        for n in SIZES
    ]


def noise(case: Noise, seeds: Sequence[int]) -> list[Claim]:
    """A claim for every seed."""
    pool = np.random.default_rng(case.dim).standard_normal((_POOL, case.dim), dtype=np.float32)
    names = tuple(f"label {place}" for place in range(len(case.shares)))
    chances = dict(zip(names, case.shares, strict=True))
    claims = []
    for seed in seeds:
        fitted = None
        generator = np.random.default_rng((seed, case.n, case.dim, len(case.shares)))
        while fitted is None:
            rows = generator.standard_normal((case.n, case.dim), dtype=np.float32)
            known = Known(case.name, case.task, rows, _drawn(case, names, generator), names)
            try:
                fitted = fit(known.dataset(np.arange(case.n)))
            except OneLabel:
                # Ten of one label can be drawn, and are no adapter yet.
                continue
        claims.append(claim(fitted, case.task, chance_score(fitted.head, pool, chances, 0.0, 1.0)))
    return claims


def _drawn(case: Noise, names: tuple[str, ...], generator: np.random.Generator) -> NDArray[Any]:
    if case.task == "regression":
        return generator.standard_normal(case.n)
    if case.task == "multilabel":
        return generator.random((case.n, len(names))) < case.shares
    return np.array(names)[generator.choice(len(names), case.n, p=case.shares)]


def tell_noise(bench: Bench) -> None:
    """Tables and targets of noise."""
    found = bench.over(noise, noises(), 200)
    together: dict[tuple[str, str, str], list[list[Claim]]] = {}
    for case, claims in found.items():
        together.setdefault((case.task, case.name, str(case.n)), []).append(claims)
    heading = "Targets that nothing can be learned from, in 16, 384 and 1,280 dimensions"
    show_claims(bench, "noise", heading, together.items())
    for task in TASKS:
        expect_claims(bench, "noise", task, [claims for case, claims in found.items() if case.task == task])
