"""Answers after a few examples a label: their accuracy, their confidence, and the share abstained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters.probe.fit import fit
from benchmarks.honesty import sets
from benchmarks.honesty.bench import WANTED_ACCURACY, Bench, splits_of
from benchmarks.honesty.scores import Answers, Known, Rows, even_weights, mean, own_labels, right_answers

_TESTED = 2_000
# A label with fewer inputs left to test on says nothing of itself.
_FEWEST_TESTED = 5

# Promised limits.
_ANSWERED_ACCURACY, _ANYWHERE = 0.94, 0.90  # of what is answered, on average and for each set and size
_OF_HINDSIGHT = 0.85  # share answered, over the share that the best threshold would answer
_CALIBRATION_ERROR, _CALIBRATED_FROM = 0.05, 10  # from so many examples a label
# Fewer answers than this share of the inputs say little about their accuracy.
_FEWEST_ANSWERED = 0.01


@dataclass(frozen=True, slots=True)
class Shots:
    """Examples of each label of a set; labels: at most this number, chosen at random, 0 for all."""

    set: str
    examples: int
    labels: int = 0

    def split(self, known: Known, seed: int) -> tuple[Rows, Rows]:
        """Rows to learn and rows to test on, of labels with enough inputs for both."""
        names, counts = np.unique(known.targets, return_counts=True)
        names = names[counts >= self.examples + _FEWEST_TESTED]
        generator = np.random.default_rng((seed, self.examples))
        if self.labels:
            names = generator.choice(names, min(self.labels, len(names)), replace=False)
        order = generator.permutation(np.flatnonzero(np.isin(known.targets, names)))
        own = known.targets[order]
        places = np.empty(len(order), dtype=np.int64)
        for name in names:
            places[own == name] = np.arange((own == name).sum())
        return order[places < self.examples], order[places >= self.examples][:_TESTED]


def shots(folder: Path) -> list[Shots]:
    """5, 10 and 40 examples of each label, of every set where at least two labels have enough."""
    found = []
    for name in sets.CLASSIFIED:
        counts = np.unique(sets.classified(name, folder).targets, return_counts=True)[1]
        found += [
            Shots(name, examples)
            for examples in (5, 10, 40)
            if (counts >= examples + _FEWEST_TESTED).sum() > 1
        ]
    return found


def answers(case: Shots, seeds: Sequence[int], folder: Path) -> list[Answers]:
    """The answers of one head for each seed."""
    known = sets.classified(case.set, folder)
    return [answered(known, *case.split(known, seed)) for seed in seeds]


def answered(known: Known, learned: Rows, test: Rows) -> Answers:
    """Answers of a head fitted on some rows to other rows; each label's test inputs have the same total
    weight.
    """
    head = fit(known.dataset(learned)).head
    predictions = head.predict(known.rows[test])
    return Answers(
        predictions.confidence.astype(np.float64),
        right_answers(known, head, predictions, test),
        ~predictions.abstained,
        even_weights(known.targets[test]),
    )


@dataclass(frozen=True, slots=True)
class Decisions:
    """Decisions on tags: those to give a tag, and those not to; "answered" is what is not uncertain."""

    given: Answers
    withheld: Answers

    @classmethod
    def joined(cls, several: Sequence[Decisions]) -> Decisions:
        """All of them."""
        return cls(
            Answers.joined([one.given for one in several]), Answers.joined([one.withheld for one in several])
        )

    @property
    def coverage(self) -> float:
        """Share of decisions that are certain."""
        return self._share(self.given.coverage, self.withheld.coverage)

    @property
    def accuracy_certain(self) -> float:
        """Share of right decisions among those."""
        certain = [one.weights[one.answered] for one in (self.given, self.withheld)]
        right = [one.weights[one.answered & one.right] for one in (self.given, self.withheld)]
        total = sum(float(weights.sum()) for weights in certain)
        return sum(float(weights.sum()) for weights in right) / total if total else math.nan

    def coverage_in_hindsight(self, wanted: float) -> float:
        """The same with the best threshold for each of the two kinds."""
        return self._share(
            self.given.coverage_in_hindsight(wanted), self.withheld.coverage_in_hindsight(wanted)
        )

    def _share(self, given: float, withheld: float) -> float:
        weight, other = self.given.weights.sum(), self.withheld.weights.sum()
        return float((given * weight + withheld * other) / (weight + other))


@dataclass(frozen=True, slots=True)
class Tagged:
    """n inputs with tags as they come."""

    set: str
    n: int


TAGGED = tuple(Tagged(name, n) for name in (sets.ALL_TAGS, sets.THREE_TAGS) for n in (60, 200, 600))


def decisions(case: Tagged, seeds: Sequence[int], folder: Path) -> list[Decisions]:
    """The decisions of one head for each seed."""
    known = sets.tagged(case.set, folder)
    found = []
    for seed in seeds:
        order = np.random.default_rng((seed, case.n)).permutation(len(known.rows))
        found.append(decided(known, order[: case.n], order[case.n :][:_TESTED]))
    return found


def decided(known: Known, learned: Rows, test: Rows) -> Decisions:
    """Decisions of a head fitted on some rows on other rows, for the tags that it was taught."""
    head = fit(known.dataset(learned)).head
    predictions = head.predict(known.rows[test])
    assigned, uncertain = predictions.assigned, predictions.uncertain
    assert assigned is not None
    assert uncertain is not None
    certainty = np.where(assigned, predictions.probabilities, 1.0 - predictions.probabilities)
    right = assigned == own_labels(known, head, test)
    certain = ~uncertain & ~predictions.abstained[:, None]
    given, withheld = (
        Answers(
            certainty[these].astype(np.float64),
            right[these],
            certain[these],
            np.full(int(these.sum()), 1.0 / assigned.size),
        )
        for these in (assigned, ~assigned)
    )
    return Decisions(given, withheld)


def tell_shots(bench: Bench) -> None:
    """Tables and targets of answers."""
    found = bench.over(bench.on_sets(answers), shots(bench.folder), 20)
    joined = {case: Answers.joined(each) for case, each in found.items()}
    hindsight = {
        case: mean([one.coverage_in_hindsight(WANTED_ACCURACY) for one in each])
        for case, each in found.items()
    }
    errors = {case: mean([one.calibration_error for one in each]) for case, each in found.items()}
    rows: list[list[str | float]] = [
        [
            case.set,
            case.examples,
            one.accuracy,
            one.coverage,
            one.accuracy_answered,
            hindsight[case],
            one.calibration_error,
            errors[case],
        ]
        for case, one in joined.items()
    ]
    head = ["set", "a label", "accuracy", "answered", "right of these", "answered in hindsight"]
    head += ["ECE of all splits", "ECE of a split"]
    bench.show("shots", f"What is answered, and how sure; {splits_of(found)} splits", head, rows)
    # The sets of bench-quality are judged. Opinions are told only: hardly any can be answered at 0.95.
    joined = {case: one for case, one in joined.items() if case.set not in sets.OPINIONS}
    told = [one.accuracy_answered for one in joined.values() if one.coverage >= _FEWEST_ANSWERED]
    expect = bench.report.expect
    expect("answered: share that is right, mean", mean(told), ">=", _ANSWERED_ACCURACY)
    expect("answered: share that is right, least", min(told, default=math.nan), ">=", _ANYWHERE)
    share = mean([one.coverage for one in joined.values()]) / mean([hindsight[case] for case in joined])
    expect("answered: share of inputs, over that in hindsight", share, ">=", _OF_HINDSIGHT)
    many = [case for case in joined if case.examples >= _CALIBRATED_FROM]
    pooled = max(joined[case].calibration_error for case in many)
    expect("calibration error over all splits, largest", pooled, "<=", _CALIBRATION_ERROR)
    expect(
        "calibration error of a split, mean", mean([errors[case] for case in many]), "<=", _CALIBRATION_ERROR
    )


def tell_tags(bench: Bench) -> None:
    """Tables and targets of decisions on tags."""
    found = bench.over(bench.on_sets(decisions), TAGGED, 20)
    rows: list[list[str | float]] = []
    right, certain, hindsight = [], [], []
    for case, each in found.items():
        joined = Decisions.joined(each)
        right.append(joined.accuracy_certain)
        certain.append(joined.coverage)
        hindsight.append(mean([one.coverage_in_hindsight(WANTED_ACCURACY) for one in each]))
        given = mean([one.given.coverage_in_hindsight(WANTED_ACCURACY) for one in each])
        rows.append(
            [
                case.set,
                case.n,
                certain[-1],
                right[-1],
                hindsight[-1],
                joined.given.coverage,
                joined.given.accuracy_answered,
                given,
            ]
        )
    head = ["set", "examples", "certain", "right of these", "certain in hindsight"]
    head += ["certain of tags given", "right of these tags", "certain of them in hindsight"]
    bench.show("tags", f"Decisions on tags; {splits_of(found)} splits", head, rows)
    expect = bench.report.expect
    expect("tags: share of certain decisions that is right, least", min(right), ">=", _ANSWERED_ACCURACY)
    share = mean(certain) / mean(hindsight)
    expect("tags: share of decisions that is certain, over that in hindsight", share, ">=", _OF_HINDSIGHT)
