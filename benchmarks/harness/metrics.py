"""Measures of predictions: accuracy, calibration and ranking of doubt."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BINS = 15


def calibration_error(confidence: Array, correct: Array, bins: int = BINS) -> float:
    """Expected calibration error over equal-width bins of confidence (Guo et al. 2017).

    confidence: (n,) in 0..1; correct: (n,) of 0 and 1.
    """
    slot = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(slot, weights=confidence - correct, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def calibrated_limit(confidence: Array, draws: int = 2_000, quantile: float = 0.95) -> float:
    """The quantile of calibration errors that a perfectly calibrated model shows with these confidences.

    A finite test set makes the error of even a perfect model positive: here the outcomes are drawn with the
    very probabilities that were stated, as often as `draws`.
    """
    generator = np.random.default_rng(0)
    errors = [
        calibration_error(confidence, (generator.random(len(confidence)) < confidence).astype(np.float64))
        for _ in range(draws)
    ]
    return float(np.quantile(errors, quantile))


def auroc(positive: Array, negative: Array) -> float:
    """The chance that a positive's score exceeds a negative's, ties counted half."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    up_to = np.searchsorted(ordered, positive, side="right")
    return float((below + up_to).sum() / (2 * len(positive) * len(negative)))


def f1(predicted: list[str], true: list[str], label: str) -> float:
    """F1 of one label."""
    hits = sum(a == b == label for a, b in zip(predicted, true, strict=True))
    return 2 * hits / max(1, predicted.count(label) + true.count(label))
