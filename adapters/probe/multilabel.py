"""Fits and measures a head that gives every input any number of labels: a logistic regression per label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.heads.abstention import fit_abstention
from adapters.heads.head import Head, directions_for, sigmoid, smoothed, storable
from adapters.heads.novelty import fit_region
from adapters.heads.scaling import scaling_of
from adapters.probe.calibration import measures, temperatures
from adapters.probe.cross_validation import CrossValidation, FitInputs
from adapters.probe.decisions import MOST_DECISIONS, HeldOutDecisions
from adapters.probe.solvers.basis import basis_of
from adapters.probe.solvers.logistic import Sigmoid
from models.arrays import Bools, Floats, Integers

# Pseudo-examples with each label, and as many without it, so that few examples do not make a label rare.
_PRIOR_COUNT = 0.5
_LAST = np.array([-1])  # the column of _Frequencies for all examples


def fit_multilabel(
    data: FitInputs, targets: Bools, names: tuple[str, ...]
) -> tuple[Head, dict[str, Any], Floats]:
    """Return head, report and scores (n,), as in FittedProbe. `targets`: (n, labels), the labels present."""
    count = len(names)
    together = np.zeros(len(targets), dtype=np.int64)
    region = fit_region(
        data.embeddings, together, data.folds, directions_for(count, data.embeddings.shape[1])
    )
    scaling = scaling_of(data.embeddings)
    features = scaling.apply(data.embeddings, into=data.embeddings)
    basis = basis_of(features, data.plan.columns)
    truth = np.ascontiguousarray(targets.T, dtype=np.float32)
    training = (data.folds != np.arange(int(data.folds.max()) + 1)[:, None]).astype(np.float32)
    frequencies = _Frequencies.of(truth, training)

    def calibrate(logits: Floats, rows: Integers, strength: float) -> tuple[float, float]:
        """Return the loss of held-out logits (labels, m), and the slope of what they add to frequencies."""
        sampled = np.flatnonzero(data.sampled[rows])
        some = sampled[:: 1 + count * len(sampled) // MOST_DECISIONS]
        folds = data.folds[rows[some]]
        temperature, loss = temperatures.sigmoid_temperature(
            frequencies.beyond(logits[:, some], folds),
            truth[:, rows[some]],
            strength,
            frequencies.base[:, folds],
        )
        return loss, 1.0 / temperature

    def loss(logits: Floats, rows: Integers, strength: float) -> tuple[float, float]:
        value, slope = calibrate(logits, rows, strength)
        return value, slope / temperatures.usual_slope(strength)

    chosen = CrossValidation(
        basis.design, Sigmoid(truth), count, data.folds, training, data.memory_bytes
    ).choose(
        data.plan, np.arange(0, len(targets), data.plan.share), loss, intercepts=frequencies.trained[:, :-1]
    )
    sampled = data.sampled[chosen.rows]
    rows = chosen.rows[sampled]
    folds = data.folds[rows]
    slope = calibrate(chosen.logits, chosen.rows, chosen.strength)[1]
    beyond = frequencies.beyond(chosen.logits[:, sampled], folds)
    logits = np.ascontiguousarray((np.float32(slope) * beyond + frequencies.base[:, folds]).T)
    del beyond
    smoothing = measures.smoothing(len(np.unique(data.groups[rows])))
    held = HeldOutDecisions(
        probabilities=smoothed(sigmoid(logits), smoothing, 2),
        own=targets[rows],
        known=frequencies.known[:, folds].T,
        usual=frequencies.usual[:, folds].T,
        folds=folds,
        groups=data.groups[rows],
    )
    decisions, assigned = held.decide()
    certain = held.certain(assigned, data.answer_accuracy)
    weight, intercept = basis.weights(np.where(frequencies.known[:, -1:], chosen.weights, np.float32(0.0)))
    bias = frequencies.base[:, -1] + np.float32(slope) * frequencies.beyond(intercept[:, None], _LAST)[:, 0]
    head = Head(
        task="multilabel",
        fingerprint=data.fingerprint,
        labels=names,
        scaling=scaling,
        weight=storable(np.float32(slope) * weight),
        bias=bias,
        doubt=fit_abstention(0.0, logits, "multilabel"),
        region=region,
        decisions=decisions,
        smoothing=smoothing,
        certain=certain,
        measured=bool(held.known.any()),
    )
    scores = np.full(len(targets), np.nan, dtype=np.float32)
    if head.measured:
        answers = assigned.sum(axis=1) + held.own.sum(axis=1)
        scores[rows] = np.where(
            answers, 2.0 * (assigned & held.own).sum(axis=1) / np.maximum(answers, 1), 1.0
        )
    report = held.report(assigned) | {
        "per_label": held.per_label(assigned, targets.sum(axis=0), decisions, names),
        **held.suspects(rows, names),
        "strength": chosen.strength,
        "temperature": 1.0 / slope,
        "certain": {"given": certain[0], "not_given": certain[1]},
    }
    return head, report, scores


@dataclass(frozen=True, slots=True)
class _Frequencies:
    """Label frequencies in the training data, which predict labels without seeing an input.

    All arrays are (labels, folds + 1): a column for the training of each fold, and the last for all examples.
    """

    trained: Floats  # float32, log-odds
    base: Floats  # float32, log-odds drawn to even odds, as used in predictions
    known: Bools  # whether there were examples with the label and without, so that it could be learned
    usual: Bools  # whether most examples had the label

    @classmethod
    def of(cls, truth: Floats, training: Floats) -> _Frequencies:
        """Count `truth` (labels, n) in the rows that each fold's solution is trained on, (folds, n)."""
        parts = np.concatenate([training, np.ones((1, truth.shape[1]), dtype=np.float32)])
        have = (truth @ parts.T).astype(np.float64)
        lack = parts.sum(axis=1) - have
        known = (have > 0) & (lack > 0)
        trained = np.log(np.where(known, have, 1.0) / np.where(known, lack, 1.0))
        base = np.log((have + _PRIOR_COUNT) / (lack + _PRIOR_COUNT))
        return cls(trained.astype(np.float32), base.astype(np.float32), known, have > lack)

    def beyond(self, logits: Floats, columns: Integers) -> Floats:
        """Return what logits (labels, m) of solutions `columns` (m,) add to the log-odds; 0 unless known."""
        more: Floats = np.where(self.known[:, columns], logits - self.trained[:, columns], np.float32(0.0))
        return more
