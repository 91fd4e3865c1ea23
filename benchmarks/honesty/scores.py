"""Claims of fitted heads beside their truth on inputs whose targets are known."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.examples.target import Target, Task
from adapters.heads.answers import Predictions
from adapters.heads.head import Head
from adapters.probe.fit import Dataset, FittedProbe
from models.arrays import Doubles, Floats

Rows = NDArray[np.int64]

SCORES: Mapping[Task, str] = {"classification": "accuracy", "multilabel": "micro_f1", "regression": "r2"}
"""What each task's report is judged by; the interval is under the same name and "_interval"."""

BINS = 15


@dataclass(frozen=True, slots=True)
class Known:
    """Inputs whose targets are known.

    rows: float32 (n, dim). targets: for classification str (n,), for regression float64 (n,), for multilabel
    bool (n, labels) of `names`.
    """

    name: str
    task: Task
    rows: Floats
    targets: NDArray[Any]
    names: tuple[str, ...] = ()

    def dataset(self, rows: Rows, sampled: Sequence[bool] = ()) -> Dataset:
        """The examples at these rows, each with a digest of its own."""
        digests = [hashlib.sha256(f"{row}".encode()).hexdigest() for row in rows]
        return Dataset(self.rows[rows], self.targets_of(rows), digests, self.task, self.name, sampled=sampled)

    def targets_of(self, rows: Rows) -> list[Target]:
        """The targets at these rows, as examples have them."""
        chosen = self.targets[rows]
        if self.task != "multilabel":
            return list(chosen.tolist())
        return [tuple(name for name, has in zip(self.names, one, strict=True) if has) for one in chosen]


@dataclass(frozen=True, slots=True)
class Claim:
    """A reported score and its interval, and the true score; reported is NaN where nothing was measured."""

    reported: float
    low: float
    high: float
    true: float

    @property
    def measured(self) -> bool:
        """True if a score was reported."""
        return not math.isnan(self.reported)

    @property
    def holds(self) -> bool:
        """True if the interval contains the truth."""
        return self.low <= self.true <= self.high


def claim(fitted: FittedProbe, task: Task, true: float) -> Claim:
    """A report's claim and the truth."""
    reported = fitted.report[SCORES[task]]
    interval = fitted.report[f"{SCORES[task]}_interval"]
    if reported is None or interval is None:
        return Claim(math.nan, math.nan, math.nan, true)
    return Claim(reported, interval[0], interval[1], true)


@dataclass(frozen=True, slots=True)
class Claims:
    """The same claim over many splits."""

    claims: tuple[Claim, ...]

    @property
    def measured(self) -> tuple[Claim, ...]:
        """Those with a reported score."""
        return tuple(one for one in self.claims if one.measured)

    @property
    def coverage(self) -> float:
        """Share of intervals that hold the truth; NaN where nothing was measured."""
        return mean([one.holds for one in self.measured])

    @property
    def reported(self) -> float:
        """Mean of the reported scores."""
        return mean([one.reported for one in self.measured])

    @property
    def true(self) -> float:
        """Mean of the true scores where one was reported."""
        return mean([one.true for one in self.measured])

    @property
    def optimism(self) -> float:
        """Mean of reported minus true."""
        return mean([one.reported - one.true for one in self.measured])

    @property
    def width(self) -> float:
        """Mean width of the intervals."""
        return mean([one.high - one.low for one in self.measured])


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean, NaN of nothing."""
    return float(np.mean(values)) if len(values) else math.nan


def own_labels(known: Known, head: Head, rows: Rows) -> NDArray[np.bool_]:
    """The labels of each input, bool (m, labels), for multilabel."""
    places = [known.names.index(label) for label in head.labels]
    own: NDArray[np.bool_] = known.targets[rows][:, places]
    return own


def right_answers(known: Known, head: Head, predictions: Predictions, rows: Rows) -> NDArray[np.bool_]:
    """True where the top label is right, bool (m,), for classification."""
    right: NDArray[np.bool_] = np.array(head.labels)[predictions.answers] == known.targets[rows]
    return right


def true_score(known: Known, head: Head, rows: Rows, weights: Doubles | None = None) -> float:
    """The head's score on the inputs at these rows: accuracy (weighted), micro-F1 of its labels, or R²."""
    predictions = head.predict(known.rows[rows])
    if known.task == "classification":
        return float(np.average(right_answers(known, head, predictions, rows), weights=weights))
    if known.task == "multilabel":
        assert predictions.assigned is not None
        own = own_labels(known, head, rows)
        hits, total = (own & predictions.assigned).sum(), own.sum() + predictions.assigned.sum()
        return float(2.0 * hits / total) if total else 0.0
    assert predictions.values is not None
    own = known.targets[rows]
    return float(1.0 - ((own - predictions.values) ** 2).sum() / ((own - own.mean()) ** 2).sum())


def chance_score(
    head: Head, pool: Floats, chances: Mapping[str, float], mean: float, deviation: float
) -> float:
    """The head's score on inputs like the pool's, if targets are drawn without a look at them.

    chances: of each label (the others are never drawn); mean and deviation: of the numbers. The draw is
    integrated out, so that no test set of any size would be exacter.
    """
    predictions = head.predict(pool)
    likely = np.array([chances.get(label, 0.0) for label in head.labels])
    if head.task == "classification":
        return float(likely[predictions.answers].mean())
    if head.task == "multilabel":
        assert predictions.assigned is not None
        given = predictions.assigned.mean(axis=0)
        return float(2.0 * (given * likely).sum() / (given.sum() + likely.sum()))
    assert predictions.values is not None
    return float(-((predictions.values - mean) ** 2).mean() / deviation**2)


def even_weights(labels: NDArray[np.str_], shares: Mapping[str, float] | None = None) -> Doubles:
    """Weights (n,) that give every label the same share, or the shares that are named; their sum is 1."""
    names, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    wanted = np.array([1.0 if shares is None else shares[name] for name in names.tolist()])
    weights: Doubles = (wanted / wanted.sum() / counts)[places]
    return weights


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to m inputs: confidence and weights, float64 (m,); right, and answered, bool (m,)."""

    confidence: Doubles
    right: NDArray[np.bool_]
    answered: NDArray[np.bool_]
    weights: Doubles

    @classmethod
    def joined(cls, several: Sequence[Answers]) -> Answers:
        """All of them, each counting alike."""
        return cls(
            np.concatenate([one.confidence for one in several]),
            np.concatenate([one.right for one in several]),
            np.concatenate([one.answered for one in several]),
            np.concatenate([one.weights for one in several]) / len(several),
        )

    @property
    def accuracy(self) -> float:
        """Share of right answers, had all been given."""
        return float(self.weights[self.right].sum() / self.weights.sum())

    @property
    def coverage(self) -> float:
        """Share of inputs that are answered."""
        return float(self.weights[self.answered].sum() / self.weights.sum())

    @property
    def accuracy_answered(self) -> float:
        """Share of right answers among those given; NaN without any."""
        given = self.weights[self.answered].sum()
        return float(self.weights[self.answered & self.right].sum() / given) if given else math.nan

    @property
    def calibration_error(self) -> float:
        """Expected calibration error over equal-width bins of confidence (Guo et al. 2017)."""
        slot = np.minimum((self.confidence * BINS).astype(int), BINS - 1)
        gap = np.bincount(slot, weights=self.weights * (self.confidence - self.right), minlength=BINS)
        return float(np.abs(gap).sum() / self.weights.sum())

    def coverage_in_hindsight(self, wanted: float) -> float:
        """The largest share of inputs, the surest ones, of whose answers the wanted share is right."""
        order = np.argsort(-self.confidence, kind="stable")
        confidence, weights = self.confidence[order], self.weights[order]
        given = np.cumsum(weights)
        # A threshold lies between two different confidences.
        ends = np.append(confidence[:-1] > confidence[1:], True)
        good = np.flatnonzero((np.cumsum(weights * self.right[order]) >= wanted * given) & ends)
        return float(given[good[-1]] / given[-1]) if len(good) else 0.0
