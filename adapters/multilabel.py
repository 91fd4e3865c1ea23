"""Fits and measures a head that gives every input any number of labels: one logistic regression for each."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters import calibration
from adapters.features import basis_of, scaling_of
from adapters.head import Head, directions_for, doubt_of, sigmoid, storable
from adapters.logistic import Sigmoid
from adapters.region import fit_region
from adapters.selection import CrossValidation, Prepared

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

_GRID = np.linspace(0.05, 0.95, 19).astype(np.float32)
# A label's own best threshold counts as much as the common one when it has this many examples.
_PRIOR_EXAMPLES = 10.0
_RESAMPLES = 500


def fit_multilabel(
    data: Prepared, targets: Bools, names: tuple[str, ...]
) -> tuple[Head, dict[str, Any], Floats]:
    """Head, report and scores (n,) for targets, which names are there (n, labels); see linear_probe.fit."""
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

    def loss(logits: Floats, rows: NDArray[np.int64], strength: float) -> tuple[float, float]:
        temperature, value = calibration.sigmoid_temperature(logits, truth[:, rows], strength)
        return value, 1.0 / (temperature * calibration.usual_slope(strength))

    chosen = CrossValidation(
        basis.design, Sigmoid(truth), count, data.folds, training, data.memory_bytes
    ).choose(data.plan, np.arange(0, len(targets), data.plan.share), loss)
    own, dealt = targets[chosen.rows], data.folds[chosen.rows]
    temperature = calibration.sigmoid_temperature(chosen.logits, truth[:, chosen.rows], chosen.strength)[0]
    logits = np.ascontiguousarray(chosen.logits.T) / np.float32(temperature)
    probabilities = sigmoid(logits)
    assigned = np.zeros_like(own)
    for fold in np.unique(dealt):
        # The thresholds that measure a fold come from the others, as everything else does.
        there = dealt == fold
        assigned[there] = probabilities[there] >= _decisions(probabilities[~there], own[~there])
    decisions = _decisions(probabilities, own)
    right = (assigned == own).all(axis=1)
    confidence = np.where(probabilities >= decisions, probabilities, 1.0 - probabilities).min(
        axis=1, initial=1.0
    )
    threshold = calibration.answer_threshold(confidence, right, data.answer_accuracy)
    weight, bias = basis.weights(chosen.weights)
    head = Head(
        task="multilabel",
        fingerprint=data.fingerprint,
        labels=names,
        scaling=scaling,
        weight=storable(weight),
        bias=bias,
        temperature=temperature,
        doubt=doubt_of(threshold, logits, "multilabel"),
        region=region,
        decisions=decisions,
    )
    scores = np.full(len(targets), np.nan, dtype=np.float32)
    scores[chosen.rows] = right
    measured = len(own) > 0
    report = {
        "micro_f1": _micro_f1(*_counts(own, assigned).sum(axis=1).tolist()),
        "micro_f1_interval": _micro_f1_interval(own, assigned),
        "exact_match": float(right.mean()) if measured else None,
        "per_label": _per_label(own, assigned, targets, decisions, names),
        "calibration_error": calibration.calibration_error(probabilities.ravel(), own.ravel())
        if measured
        else None,
        "strength": chosen.strength,
        "temperature": temperature,
        "threshold": threshold,
    }
    return head, report, scores


def _counts(own: Bools, assigned: Bools) -> NDArray[np.int64]:
    """Hits, labels assigned, labels there: (3, labels)."""
    counts: NDArray[np.int64] = np.stack(
        [(own & assigned).sum(axis=0), assigned.sum(axis=0), own.sum(axis=0)]
    )
    return counts


def _micro_f1(hits: float, assigned: float, there: float) -> float | None:
    return 2.0 * hits / (assigned + there) if assigned + there else None


def _decisions(probabilities: Floats, own: Bools) -> Floats:
    """Per label the probability from which assigning it gives the best F1, drawn to the best common one."""
    count = own.shape[1]
    if not len(own):
        return np.full(count, 0.5, dtype=np.float32)
    # hits[t, c] and assigned[t, c] at every threshold of the grid.
    hits = np.stack([((probabilities >= edge) & own).sum(axis=0) for edge in _GRID]).astype(np.float64)
    assigned = np.stack([(probabilities >= edge).sum(axis=0) for edge in _GRID]).astype(np.float64)
    there = own.sum(axis=0).astype(np.float64)
    common = 2.0 * hits.sum(axis=1) / np.maximum(assigned.sum(axis=1) + there.sum(), 1.0)
    # As if every label had a few more examples, which fare as all labels do together.
    share = _PRIOR_EXAMPLES / max(float(there.sum()), 1.0)
    smooth = (
        2.0
        * (hits + share * hits.sum(axis=1, keepdims=True))
        / np.maximum(assigned + there + share * (assigned.sum(axis=1, keepdims=True) + there.sum()), 1e-9)
    )
    # Ties go to the threshold nearest to a half.
    distance = np.abs(_GRID - 0.5)
    best = (smooth + 1e-6 * common[:, None] - 1e-9 * distance[:, None]).argmax(axis=0)
    result: Floats = _GRID[best]
    return result


def _micro_f1_interval(own: Bools, assigned: Bools) -> list[float] | None:
    """95 % of micro-F1 over resamples of the examples, seeded."""
    n = len(own)
    terms = np.stack([(own & assigned).sum(axis=1), assigned.sum(axis=1), own.sum(axis=1)], axis=1)
    generator = np.random.default_rng(0)
    found = []
    for _ in range(_RESAMPLES if n else 0):
        score = _micro_f1(*(np.bincount(generator.integers(0, n, n), minlength=n) @ terms).tolist())
        if score is not None:
            found.append(score)
    return [float(edge) for edge in np.quantile(found, (0.025, 0.975))] if found else None


def _per_label(
    own: Bools, assigned: Bools, targets: Bools, decisions: Floats, names: tuple[str, ...]
) -> dict[str, dict[str, float | int | None]]:
    """Precision, recall and F1 held out, None where nothing is to divide by. support: all examples."""
    hits, given, there = _counts(own, assigned).tolist()
    return {
        name: {
            "precision": hit / answered if answered else None,
            "recall": hit / present if present else None,
            "f1": _micro_f1(hit, answered, present),
            "support": support,
            "threshold": threshold,
        }
        for name, hit, answered, present, support, threshold in zip(
            names, hits, given, there, targets.sum(axis=0).tolist(), decisions.tolist(), strict=True
        )
    }
