"""The temperatures by which logits are divided, so that probabilities are calibrated."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from adapters.probe.calibration.slopes import MOST_LOGITS, blended_loss
from models.arrays import Floats, Integers

# The usual slope of multilabel logits is one at this strength and grows with the strength.
_USUAL_STRENGTH = 0.03
_STRENGTH_POWER = 0.3
_SLOPE_DEVIATION = 0.7  # standard deviation of the prior on slopes (on their log for multilabel)


def temperature(logits: Floats, labels: Integers) -> tuple[float, float]:
    """Return the temperature of one classifier's logits (n, labels), and the mean loss (Guo et al. 2017).

    A network is trained to be calibrated, so a prior draws the slope, one over the temperature, to one. The
    prior matters for few examples only. Solved by Newton's method.
    """
    step = max(1, logits.size // MOST_LOGITS)
    columns, own = np.ascontiguousarray(logits[::step].T), labels[::step]
    if not len(own):
        return 1.0, 0.0
    flat, right = np.zeros(len(columns), dtype=np.float32), columns[own, np.arange(len(own))][None]
    tight = 1.0 / _SLOPE_DEVIATION**2
    slope = best = 1.0
    value = loss = math.inf
    for _ in range(20):
        found, one, aa = blended_loss([columns], flat, right, 0.0, np.array([slope]))
        objective = found + 0.5 * tight * (slope - 1.0) ** 2
        if objective > value + 1e-9:
            # The step was too long: go half way back to the best slope.
            slope = 0.5 * (slope + best)
            continue
        drop, best, value, loss = value - objective, slope, objective, found
        gradient, curvature = float(one[0]) + tight * (slope - 1.0), float(aa[0, 0]) + tight
        if min(drop, 0.5 * gradient**2 / curvature) < 1e-4 * len(own):
            break
        slope = max(slope - gradient / curvature, 1e-3)
    return 1.0 / best, loss / len(own)


def usual_slope(strength: float) -> float:
    """Return the prior slope of multilabel logits at this strength of regularisation."""
    return float((strength / _USUAL_STRENGTH) ** _STRENGTH_POWER)


def sigmoid_temperature(
    logits: Floats, targets: Floats, strength: float, base: Floats
) -> tuple[float, float]:
    """Return the temperature and the loss per example, for labels that are each yes or no.

    `logits`, `targets`, `base`: (labels, n). `base`: log-odds known without the input, such as an intercept;
    they are not divided by the temperature, so that they do not grow with what inputs say.
    """
    if not logits.shape[1]:
        return _temperature(lambda slope: (0.0, 0.0, 0.0), 0, strength)

    def measure(slope: float) -> tuple[float, float, float]:
        scaled = logits * np.float32(slope) + base
        chances = np.reciprocal(1.0 + np.exp(-np.clip(scaled, -80.0, 80.0)))
        loss = np.logaddexp(np.float32(0.0), scaled) - targets * scaled
        first = ((chances - targets) * logits).sum(dtype=float)
        second = (chances * (1.0 - chances) * logits * logits).sum(dtype=float)
        return float(loss.sum(dtype=float)), float(first), float(second)

    return _temperature(measure, logits.shape[1], strength)


def _temperature(
    measure: Callable[[float], tuple[float, float, float]], n: int, strength: float
) -> tuple[float, float]:
    """Return temperature and loss per example, by Newton on the log of the slope (1 / temperature)."""
    usual = math.log(usual_slope(strength))
    place, loss = usual, math.inf
    prior = 1.0 / _SLOPE_DEVIATION**2
    for _ in range(12):
        slope = math.exp(place)
        loss, first, second = measure(slope)
        gradient = slope * first + prior * (place - usual)
        curvature = slope * slope * second + max(slope * first, -0.5 * slope * slope * second) + prior
        move = -gradient / curvature
        if abs(move) < 1e-3:
            break
        place = min(max(place + min(max(move, -1.0), 1.0), usual - 4.0), usual + 4.0)
    return math.exp(-place), loss / max(n, 1)
