"""Scores reported where examples are near copies of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from adapters.example import Task
from adapters.linear_probe import fit
from benchmarks import honesty_sets as sets
from benchmarks.honesty_bench import OPTIMISM, TASKS, Bench, show_claims
from benchmarks.honesty_scores import Claim, Claims, chance_score, claim, true_score

_TESTED = 2_000
_POOL = 1_000  # inputs to answer where targets are drawn


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


def copied_cases() -> list[Copied]:
    """Every set and share, with real and with drawn targets."""
    tasks: dict[Task, tuple[str, ...]] = {
        "classification": sets.COPIED,
        "multilabel": (sets.TOPICS,),
        "regression": sets.COPIED[:1],
    }
    return [
        Copied(task, name, share, flipped)
        for task, names in tasks.items()
        for name in names
        for flipped in (True, False)
        for share in (0.1, 0.3, 0.5)
    ]


def copied(case: Copied, seeds: Sequence[int], folder: Path) -> list[Claim]:
    """A claim for every seed. A copy has the target of its original, and a digest of its own."""
    planted = sets.copies(case.set, folder)
    known = sets.known(case.task, sets.THREE_TAGS if case.task == "multilabel" else case.set, folder)
    pool = planted.rows.shape[1]
    claims = []
    for seed in seeds:
        generator = np.random.default_rng((seed, round(100 * case.share)))
        if case.flipped:
            known = replace(known, **_coins(known.task, len(known.rows), generator))
        copies = round(_EXAMPLES * case.share)
        originals = generator.permutation(pool)[: _EXAMPLES - copies]
        doubled = originals[:copies]
        kinds = generator.integers(0, len(planted.kinds), copies)
        # Copies are appended to the set as inputs like any other.
        whole = replace(
            known,
            rows=np.concatenate([known.rows, planted.rows[kinds, doubled]]),
            targets=np.concatenate([known.targets, known.targets[doubled]]),
        )
        learned = np.concatenate([originals, len(known.rows) + np.arange(copies)])
        fitted = fit(whole.dataset(learned))
        if case.flipped:
            true = chance_score(
                fitted.head, known.rows[pool:][:_POOL], dict.fromkeys(whole.names, 0.5), 0.0, 1.0
            )
        else:
            rest = np.setdiff1d(np.arange(len(known.rows)), originals)[-_TESTED:]
            if case.task == "classification":
                rest = rest[np.isin(known.targets[rest], known.targets[originals])]
            true = true_score(known, fitted.head, rest)
        claims.append(claim(fitted, case.task, true))
    return claims


def _coins(task: Task, n: int, generator: np.random.Generator) -> dict[str, Any]:
    """Fields of Known: two labels, two tags, or normal numbers, drawn for n inputs."""
    names = ("heads", "tails")
    if task == "regression":
        return {"targets": generator.standard_normal(n)}
    if task == "multilabel":
        return {"targets": generator.random((n, 2)) < 0.5, "names": names}
    return {"targets": np.array(names)[generator.integers(0, 2, n)], "names": names}


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
