"""Scores reported on real sets: drawn as they come, with rare labels, after corrections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapters.examples.target import Task
from adapters.heads.head import Head
from adapters.probe.fit import OneLabel, fit
from benchmarks.honesty import sets
from benchmarks.honesty.bench import COVERAGE, TASKS, Bench, expect_claims, show_claims, splits_of
from benchmarks.honesty.scores import (
    Claim,
    Claims,
    Known,
    Rows,
    claim,
    even_weights,
    mean,
    own_labels,
    right_answers,
    true_score,
)

SIZES = (10, 20, 50, 200)
_TESTED = 2_000
# A rating that lies further off than this many residual deviations is worth a correction.
_CORRECTED_FROM = 1.0


@dataclass(frozen=True, slots=True)
class Drawn:
    """n inputs of a real set as they come. labels: a number of its labels, chosen at random; 0 for all."""

    task: Task
    set: str
    n: int
    labels: int = 0

    @property
    def name(self) -> str:
        """As the table says it."""
        return f"{self.set}, {self.labels} labels" if self.labels else self.set


def draws() -> list[Drawn]:
    """Every real set in every size that leaves enough to be tested on."""
    labelled = [Drawn("classification", name, n) for name in sets.CLASSIFIED for n in SIZES]
    tags = [Drawn("multilabel", name, n) for name in (sets.ALL_TAGS, sets.THREE_TAGS) for n in SIZES]
    ratings = [Drawn("regression", name, n) for name in sets.OPINIONS for n in SIZES]
    few = [Drawn("classification", sets.TOPICS, n, 14) for n in (15, 30)]
    return [one for one in labelled if (one.set, one.n) != ("tux-paint", 200)] + tags + ratings + few


def drawn(case: Drawn, seeds: Sequence[int], folder: Path) -> list[Claim]:
    """A claim for every seed, true on the rest of the set; labels that were not drawn are not asked for."""
    known = sets.known(case.task, case.set, folder)
    claims = []
    for seed in seeds:
        generator = np.random.default_rng((seed, case.n))
        fitted = None
        while fitted is None:
            order = generator.permutation(len(known.rows))
            if case.labels:
                some = generator.choice(np.unique(known.targets), case.labels, replace=False)
                order = order[np.isin(known.targets[order], some)]
            try:
                fitted = fit(known.dataset(order[: case.n]))
            except OneLabel:
                continue
        claims.append(claim(fitted, case.task, true_score(known, fitted.head, _tested(known, order, case.n))))
    return claims


def _tested(known: Known, order: Rows, n: int) -> Rows:
    """The rows to test on after the first n of the order, of labels among these n."""
    rest = order[n:]
    if known.task == "classification":
        rest = rest[np.isin(known.targets[rest], known.targets[order[:n]])]
    return rest[:_TESTED]


RARE = {"2 labels x 10, 12 x 1": (10, 10, *[1] * 12), "14 labels x 1 or 2": (1, 2) * 7}
"""Examples of each label where some have one or two."""


def rare(case: str, seeds: Sequence[int], folder: Path) -> list[Claim]:
    """Claims about topics, one for each seed."""
    known = sets.classified(sets.TOPICS, folder)
    return [with_rare_labels(known, RARE[case], seed) for seed in seeds]


def with_rare_labels(known: Known, examples: Sequence[int], seed: int) -> Claim:
    """The claim for random examples; the truth weighs labels as the examples do."""
    generator = np.random.default_rng(seed)
    names = generator.permutation(np.unique(known.targets))[: len(examples)]
    sizes = dict(zip(names.tolist(), examples, strict=True))
    order = generator.permutation(np.flatnonzero(np.isin(known.targets, names)))
    learned = np.concatenate([order[known.targets[order] == name][:size] for name, size in sizes.items()])
    rest = order[~np.isin(order, learned)][:_TESTED]
    fitted = fit(known.dataset(learned))
    weights = even_weights(known.targets[rest], {name: float(size) for name, size in sizes.items()})
    return claim(fitted, known.task, true_score(known, fitted.head, rest, weights))


@dataclass(frozen=True, slots=True)
class Corrected:
    """The claim of an adapter that received only its mistakes as feedback, and its true score before."""

    claim: Claim
    true_before: float
    answered: float
    examples: int


CORRECTED: tuple[Drawn, ...] = (
    Drawn("classification", sets.TOPICS, 80, 14),
    Drawn("classification", sets.OPINIONS[0], 80),
    Drawn("multilabel", sets.ALL_TAGS, 80),
    Drawn("regression", sets.OPINIONS[0], 80),
)
"""Adapters as they start."""
_ROUNDS, _ASKED = 6, 100


def corrected(case: Drawn, seeds: Sequence[int], folder: Path) -> list[Corrected]:
    """Six rounds of a hundred inputs asked, of which only the mistakes are sent back, with their targets."""
    known = sets.known(case.task, case.set, folder)
    found = []
    for seed in seeds:
        generator = np.random.default_rng(seed)
        order = generator.permutation(len(known.rows))
        if case.labels:
            some = generator.choice(np.unique(known.targets), case.labels, replace=False)
            order = order[np.isin(known.targets[order], some)]
        found.append(after_corrections(known, order, case.n, _ROUNDS, _ASKED))
    return found


def after_corrections(known: Known, order: Rows, start: int, rounds: int, asked: int) -> Corrected:
    """The first rows of the order are learned, the next ones asked by rounds, and the last ones tested on."""
    test = order[start + rounds * asked :][:_TESTED]
    learned, sampled = order[:start], [True] * start
    fitted = fit(known.dataset(learned, sampled))
    before = true_score(known, fitted.head, test)
    for turn in range(rounds):
        these = order[start + turn * asked :][:asked]
        wrong = these[_mistaken(known, fitted.head, these)]
        learned, sampled = np.concatenate([learned, wrong]), sampled + [False] * len(wrong)
        fitted = fit(known.dataset(learned, sampled))
    abstained = fitted.head.predict(known.rows[test]).abstained
    true = true_score(known, fitted.head, test)
    return Corrected(claim(fitted, known.task, true), before, float(1.0 - abstained.mean()), len(learned))


def _mistaken(known: Known, head: Head, rows: Rows) -> NDArray[np.bool_]:
    """The answers that a user would correct, bool (m,)."""
    predictions = head.predict(known.rows[rows])
    if predictions.values is not None:
        far: NDArray[np.bool_] = (
            np.abs(predictions.values - known.targets[rows]) > _CORRECTED_FROM * head.residual_deviation
        )
        return far
    if predictions.assigned is not None:
        # A correction gives all tags of an input, also those that the head was never taught.
        own = own_labels(known, head, rows)
        untaught = known.targets[rows].sum(axis=1) > own.sum(axis=1)
        wrong: NDArray[np.bool_] = (own != predictions.assigned).any(axis=1) | untaught
        return wrong
    return ~right_answers(known, head, predictions, rows)


def tell_real(bench: Bench) -> None:
    """Tables and targets of real sets as they come."""
    found = bench.over(bench.on_sets(drawn), draws(), 200)
    rows = [((case.task, case.name, str(case.n)), [claims]) for case, claims in found.items()]
    show_claims(bench, "real", "Real sets, drawn as they come", rows)
    for task in TASKS:
        own = [claims for case, claims in found.items() if case.task == task]
        expect_claims(bench, "real sets", task, own)


def tell_rare(bench: Bench) -> None:
    """Tables and targets of labels with one or two examples."""
    found = bench.over(bench.on_sets(rare), RARE, 200)
    rows = [
        (("classification", f"topics, {case}", str(sum(RARE[case]))), [claims])
        for case, claims in found.items()
    ]
    show_claims(bench, "rare", "Labels of which there are one or two examples", rows)
    expect_claims(bench, "rare labels", "classification", found.values())


def tell_corrections(bench: Bench) -> None:
    """Tables and targets of corrections."""
    found = bench.over(bench.on_sets(corrected), CORRECTED, 40)
    rows: list[list[str | float]] = []
    for case, each in found.items():
        claims = Claims(tuple(one.claim for one in each))
        corrections = mean([one.examples for one in each]) - case.n
        rows.append(
            [
                case.task,
                case.name,
                case.n,
                round(corrections),
                claims.reported,
                mean([one.true_before for one in each]),
                claims.true,
                claims.coverage,
                mean([one.answered for one in each]),
            ]
        )
        name = f"corrections only, {case.task}, {case.name}: intervals that hold the truth"
        bench.report.expect(name, claims.coverage, ">=", COVERAGE)
    head = ["task", "set", "examples", "corrections", "reported", "true before", "true"]
    head += ["intervals that hold", "answered"]
    heading = f"Only mistakes sent back, for six rounds of 100 inputs; {splits_of(found)} splits"
    bench.show("corrections", heading, head, rows)
