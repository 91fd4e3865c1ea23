"""Adapters from their first example on, beside scikit-learn."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, RidgeCV

from adapters.heads.answers import Predictions
from adapters.probe.fit import fit
from benchmarks.honesty import sets
from benchmarks.honesty.answers import Shots
from benchmarks.honesty.bench import SURE, Bench, expect_sure, splits_of
from benchmarks.honesty.scores import Known, Rows, even_weights, mean, right_answers, true_score
from models.arrays import Doubles

Labels = NDArray[np.str_]

_TESTED = 2_000
_TESTED_WHILE_GROWING = 600

# Promised limits.
_DROP = 0.03  # balanced accuracy under the highest so far
_OVERCONFIDENCE = 0.15  # mean confidence minus accuracy
_BEHIND = 0.01  # accuracy under LogisticRegression's
_LOSS_BEHIND = 0.02  # nats above LogisticRegressionCV's log loss
_R2_BEHIND = 0.02  # R² under RidgeCV's


@dataclass(frozen=True, slots=True)
class Growing:
    """One example of each of some labels of a set, then more, one at a time, up to 60."""

    set: str
    labels: int


GROWING = (
    *(Growing(name, labels) for name in (sets.TOPICS, "trec-fine") for labels in (5, 10, 14)),
    *(Growing("fashion-mnist", labels) for labels in (5, 10)),
)
_GROWN = 60
# Rarer labels than this have too few inputs to be drawn from and tested on.
_COMMON = 20


@dataclass(frozen=True, slots=True)
class Growth:
    """After every example: balanced accuracy, accuracy, mean confidence. sure: predictions above SURE."""

    balanced: Doubles
    accuracy: Doubles
    confidence: Doubles
    sure: int
    sure_wrong: int
    constant: int


def growth(case: Growing, seeds: Sequence[int], folder: Path) -> list[Growth]:
    """A curve for each seed."""
    known = sets.classified(case.set, folder)
    return [grown(known, case.labels, _GROWN, seed) for seed in seeds]


def grown(known: Known, labels: int, examples: int, seed: int) -> Growth:
    """One curve; every seed has other labels, other examples and another order."""
    names, counts = np.unique(known.targets, return_counts=True)
    generator = np.random.default_rng((seed, labels))
    some = generator.choice(names[counts >= _COMMON], labels, replace=False)
    order = generator.permutation(np.flatnonzero(np.isin(known.targets, some)))
    first = [int(order[known.targets[order] == name][0]) for name in some]
    rest = order[~np.isin(order, first)]
    more = examples - labels
    learned, test = np.concatenate([first, rest[:more]]), rest[more:][:_TESTED_WHILE_GROWING]
    weights = even_weights(known.targets[test])
    steps, sure, sure_wrong, constant = [], 0, 0, 0
    for n in range(labels, examples + 1):
        head = fit(known.dataset(learned[:n])).head
        predictions = head.predict(known.rows[test])
        right = right_answers(known, head, predictions, test)
        certain = predictions.confidence > SURE
        sure, sure_wrong = sure + int(certain.sum()), sure_wrong + int((certain & ~right).sum())
        constant += is_constant(predictions)
        steps.append((right @ weights, right.mean(), predictions.confidence.mean()))
    balanced, accuracy, confidence = np.array(steps).T
    return Growth(balanced, accuracy, confidence, sure, sure_wrong, constant)


def is_constant(predictions: Predictions) -> bool:
    """True if every input gets the same label."""
    return len(np.unique(predictions.answers)) == 1


FEW = tuple(
    Shots(name, examples, labels)
    for name, labels in (*((name, 2) for name in sets.OPINIONS), (sets.TOPICS, 14))
    for examples in (1, 2, 3, 4, 6, 8, 12, 16)
)
"""A few examples a label, where scikit-learn is run beside."""


@dataclass(frozen=True, slots=True)
class Beside:
    """One head beside LogisticRegression (C = 1) and LogisticRegressionCV on the same embeddings.

    Losses are log losses in nats. cross_validated: NaN with one example a label, which makes no folds.
    """

    accuracy: float
    loss: float
    plain_accuracy: float
    cross_validated_accuracy: float
    cross_validated_loss: float
    constant: bool
    sure: int
    sure_wrong: int


def beside(case: Shots, seeds: Sequence[int], folder: Path) -> list[Beside]:
    """One comparison for each seed."""
    known = sets.classified(case.set, folder)
    return [compared(known, *case.split(known, seed)) for seed in seeds]


def compared(known: Known, learned: Rows, test: Rows) -> Beside:
    """A head of some rows beside scikit-learn on the same, asked about others; labels weigh the same."""
    weights = even_weights(known.targets[test])
    rows, own = known.rows[learned], known.targets[learned]
    head = fit(known.dataset(learned)).head
    predictions = head.predict(known.rows[test])
    right = right_answers(known, head, predictions, test)
    sure = predictions.confidence > SURE
    their_accuracy = their_loss = math.nan
    folds = min(5, int(np.unique(own, return_counts=True)[1].min()))
    with warnings.catch_warnings():
        # A few steps more would not change an answer.
        warnings.simplefilter("ignore")
        plain = LogisticRegression(C=1.0, max_iter=1_000).fit(rows, own)
        if folds > 1:
            other = LogisticRegressionCV(
                Cs=10,
                cv=folds,
                max_iter=300,
                l1_ratios=(0.0,),
                scoring="neg_log_loss",
                use_legacy_attributes=False,
            ).fit(rows, own)
            theirs = other.predict_proba(known.rows[test])
            their_accuracy = float((other.predict(known.rows[test]) == known.targets[test]) @ weights)
            their_loss = _log_loss(theirs, other.classes_, known.targets[test], weights)
    probabilities = predictions.probabilities.astype(np.float64)
    return Beside(
        accuracy=float(right @ weights),
        loss=_log_loss(probabilities, np.array(head.labels), known.targets[test], weights),
        plain_accuracy=float((plain.predict(known.rows[test]) == known.targets[test]) @ weights),
        cross_validated_accuracy=their_accuracy,
        cross_validated_loss=their_loss,
        constant=is_constant(predictions),
        sure=int(sure.sum()),
        sure_wrong=int((sure & ~right).sum()),
    )


def _log_loss(probabilities: Doubles, labels: Labels, own: Labels, weights: Doubles) -> float:
    """The weighted mean, in nats; labels: sorted, of the columns."""
    there = probabilities[np.arange(len(own)), np.searchsorted(labels, own)]
    return float(-np.log(np.maximum(there, 1e-12)) @ weights)


RATED = tuple((name, n) for name in sets.OPINIONS for n in (20, 50, 200, 600))
"""Ratings to predict, where RidgeCV is run beside: the set, and how many examples."""
_RIDGE_STRENGTHS = np.logspace(-3, 3, 13)


def predicted(case: tuple[str, int], seeds: Sequence[int], folder: Path) -> list[tuple[float, float]]:
    """R² for each seed, and that of RidgeCV."""
    name, n = case
    known = sets.rated(name, folder)
    found = []
    for seed in seeds:
        order = np.random.default_rng((seed, n)).permutation(len(known.rows))
        found.append(predicted_beside(known, order[:n], order[n:][:_TESTED]))
    return found


def predicted_beside(known: Known, learned: Rows, test: Rows) -> tuple[float, float]:
    """R² of a head of some rows on others, and that of RidgeCV."""
    other = RidgeCV(_RIDGE_STRENGTHS).fit(known.rows[learned], known.targets[learned])
    theirs = float(other.score(known.rows[test], known.targets[test]))
    return true_score(known, fit(known.dataset(learned)).head, test), theirs


def tell_growth(bench: Bench) -> None:
    """Tables and targets of growth."""
    found = bench.over(bench.on_sets(growth), GROWING, 20)
    rows: list[list[str | float]] = []
    drops, excesses = [], []
    for case, each in found.items():
        balanced = np.mean([one.balanced for one in each], axis=0)
        excess = np.mean([one.confidence - one.accuracy for one in each], axis=0)
        drop = np.maximum.accumulate(balanced) - balanced
        drops.append(float(drop.max()))
        excesses.append(float(excess.max()))
        shown = [0, 1, 2, 4, 8, 16, 32, len(balanced) - 1]
        rows.append(
            [
                case.set,
                case.labels,
                " ".join(f"{balanced[place]:.2f}" for place in shown),
                f"{drops[-1]:.3f} at {case.labels + int(drop.argmax())}",
                f"{excesses[-1]:+.3f} at {case.labels + int(excess.argmax())}",
                sum(one.sure for one in each),
                sum(one.sure_wrong for one in each),
                sum(one.constant for one in each),
            ]
        )
    head = ["set", "labels", "balanced accuracy after 0, 1, 2, 4, 8, 16, 32 and all more", "deepest drop"]
    head += ["most overconfident", f"above {SURE}", "wrong of these", "constant heads"]
    heading = f"Growth from one example a label to 60 examples, one at a time; {splits_of(found)} orders"
    bench.show("growth", heading, head, rows)
    every = [one for each in found.values() for one in each]
    bench.report.expect("growth: balanced accuracy under its highest so far", max(drops), "<=", _DROP)
    bench.report.expect("growth: confidence over accuracy", max(excesses), "<=", _OVERCONFIDENCE)
    expect_sure(bench, "growth", sum(one.sure for one in every), sum(one.sure_wrong for one in every))


def tell_few(bench: Bench) -> None:
    """Tables and targets of a few examples a label."""
    found = bench.over(bench.on_sets(beside), FEW, 100)
    rows: list[list[str | float]] = []
    ahead: dict[int, list[float]] = {}
    losses: dict[int, list[float]] = {}
    for case, each in found.items():
        accuracy, plain = mean([one.accuracy for one in each]), mean([one.plain_accuracy for one in each])
        loss, theirs = mean([one.loss for one in each]), mean([one.cross_validated_loss for one in each])
        ahead.setdefault(case.examples, []).append(accuracy - plain)
        losses.setdefault(case.examples, []).append(loss - theirs)
        rows.append(
            [
                f"{case.set}, {case.labels} labels",
                case.examples,
                accuracy,
                plain,
                mean([one.cross_validated_accuracy for one in each]),
                loss,
                theirs,
                sum(one.constant for one in each),
                sum(one.sure for one in each),
                sum(one.sure_wrong for one in each),
            ]
        )
    head = ["set", "a label", "accuracy", "LogisticRegression", "LogisticRegressionCV", "log loss"]
    head += ["LogisticRegressionCV's", "constant heads", f"above {SURE}", "wrong of these"]
    heading = f"A few examples a label, beside scikit-learn; {splits_of(found)} splits"
    bench.show("few", heading, head, rows)
    expect = bench.report.expect
    ours = {examples: mean(each) for examples, each in ahead.items()}
    worst = min(ours, key=ours.__getitem__)
    name = f"few: accuracy over LogisticRegression's, least (at {worst} a label)"
    expect(name, ours[worst], ">=", -_BEHIND)
    theirs_ahead = {examples: mean(each) for examples, each in losses.items() if examples > 1}
    worst = max(theirs_ahead, key=theirs_ahead.__getitem__)
    name = f"few: log loss over LogisticRegressionCV's, most (at {worst} a label)"
    expect(name, theirs_ahead[worst], "<=", _LOSS_BEHIND)
    expect("few: log loss over LogisticRegressionCV's, mean", mean(list(theirs_ahead.values())), "<=", 0.0)
    two = [one for case, each in found.items() if case.labels == 2 and case.examples > 1 for one in each]
    expect("few: constant heads of two labels", sum(one.constant for one in two), "<=", 0)
    every = [one for each in found.values() for one in each]
    expect_sure(bench, "few", sum(one.sure for one in every), sum(one.sure_wrong for one in every))


def tell_ratings(bench: Bench) -> None:
    """Tables and targets of ratings."""
    found = bench.over(bench.on_sets(predicted), RATED, 40)
    rows: list[list[str | float]] = []
    behind = []
    for (name, n), each in found.items():
        ours, theirs = mean([one for one, _ in each]), mean([other for _, other in each])
        behind.append(theirs - ours)
        rows.append([name, n, ours, theirs])
    heading = f"Ratings, beside RidgeCV; {splits_of(found)} splits"
    bench.show("ratings", heading, ["set", "examples", "R²", "RidgeCV's"], rows)
    bench.report.expect("ratings: R² behind RidgeCV, most", max(behind), "<=", _R2_BEHIND)
