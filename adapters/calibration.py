"""What out-of-fold predictions say: how sure to be, when to keep silent, which labels to doubt."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

BINS = 15
_NORMAL_95 = 1.959964
# Before examples are seen: the weaker the regularisation, the larger the logits (measured on eight sets, 55
# to 3,000 examples), and the standard deviation of the log around that.
_USUAL_STRENGTH = 0.03
_STRENGTH_POWER = 0.3
_SLOPE_DEVIATION = 0.7
# More logits than this do not move a temperature.
_MOST_LOGITS = 1 << 21


def blend(
    logits: Floats,
    others: Floats,
    labels: NDArray[np.int64],
    strength: float,
) -> tuple[float, float, float]:
    """The slopes by which to multiply two classifiers' logits before adding them, and the mean loss then.

    logits, others: (labels, n) of the same examples held out; logits were regularised by strength.
    Stacking (Wolpert 1992) with two numbers, neither below zero: Newton, with a prior that matters for few
    examples only, until a step promises less than 1e-4 nats an example.
    """
    usual = usual_slope(strength)
    if not len(labels):
        return usual, 0.0, 0.0
    step = max(1, logits.size // _MOST_LOGITS)
    first, second, own = logits[:, ::step], others[:, ::step], labels[::step]
    wide, narrow = 1.0 / (_SLOPE_DEVIATION * usual) ** 2, 1.0 / _SLOPE_DEVIATION**2
    places = np.arange(len(own))
    right = np.stack([first[own, places], second[own, places]])
    slopes = best = (usual, 0.0)
    value = best_loss = math.inf
    for _ in range(12):
        loss, (one, other), (aa, ab, bb) = _blended(first, second, right, own, slopes)
        objective = loss + 0.5 * (wide * (slopes[0] - usual) ** 2 + narrow * slopes[1] ** 2)
        if objective > value + 1e-9:
            # Too far: half way back to the best so far.
            slopes = (0.5 * (slopes[0] + best[0]), 0.5 * (slopes[1] + best[1]))
            continue
        drop, best, value, best_loss = value - objective, slopes, objective, loss
        one, other = one + wide * (slopes[0] - usual), other + narrow * slopes[1]
        move = _newton(slopes, (one, other), (aa + wide, ab, bb + narrow))
        if min(drop, -0.5 * (one * move[0] + other * move[1])) < 1e-4 * len(own):
            break
        slopes = (slopes[0] + move[0], slopes[1] + move[1])
    return best[0], best[1], best_loss / len(own)


def temperature(logits: Floats, labels: NDArray[np.int64]) -> tuple[float, float]:
    """The temperature of one classifier's logits (n, labels), and the mean loss at it (Guo et al. 2017)."""
    columns = np.ascontiguousarray(logits.T)
    slope, _, loss = blend(columns, np.zeros_like(columns), labels, _USUAL_STRENGTH)
    return 1.0 / max(slope, 1e-3), loss


def _newton(
    slopes: tuple[float, float], gradient: tuple[float, float], curvature: tuple[float, float, float]
) -> tuple[float, float]:
    """The step of two numbers that stay zero or more; a slope at zero that would fall is left there."""
    (a, b), (one, other), (aa, ab, bb) = slopes, gradient, curvature
    free = a > 0.0 or one < 0.0, b > 0.0 or other < 0.0
    if all(free):
        area = max(aa * bb - ab * ab, 1e-9 * aa * bb)
        move = ((ab * other - bb * one) / area, (ab * one - aa * other) / area)
    else:
        move = (-one / aa if free[0] else 0.0, -other / bb if free[1] else 0.0)
    return max(move[0], -a), max(move[1], -b)


def _blended(
    first: Floats, second: Floats, right: Floats, own: NDArray[np.int64], slopes: tuple[float, float]
) -> tuple[float, list[float], tuple[float, float, float]]:
    """Summed cross-entropy of the blended logits, its gradient, and its Hessian's three numbers."""
    chances = np.float32(slopes[0]) * first + np.float32(slopes[1]) * second
    top = chances.max(axis=0)
    chances -= top
    loss = top - np.array(slopes, np.float32) @ right
    np.exp(chances, out=chances)
    total = chances.sum(axis=0)
    loss += np.log(total)
    chances /= total
    one, other = chances * first, chances * second
    means = np.stack([one.sum(axis=0), other.sum(axis=0)])
    gradient = (means - right).sum(axis=1, dtype=np.float64).tolist()
    curvature = (
        float(np.vdot(one, first)) - float(np.vdot(means[0], means[0])),
        float(np.vdot(one, second)) - float(np.vdot(means[0], means[1])),
        float(np.vdot(other, second)) - float(np.vdot(means[1], means[1])),
    )
    return float(loss.sum(dtype=np.float64)), gradient, curvature


def usual_slope(strength: float) -> float:
    """What logits regularised so are multiplied by, before examples are seen."""
    return float((strength / _USUAL_STRENGTH) ** _STRENGTH_POWER)


def sigmoid_temperature(
    logits: Floats, targets: Floats, strength: float, base: Floats
) -> tuple[float, float]:
    """The same for labels that are each yes or no; the loss is per example.

    logits, targets, base: (labels, n). base is added undivided: what is known without an input, as an
    intercept is, must not grow with what inputs say.
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
    """Newton on the log of the slope (one over the temperature); the temperature and the loss per example."""
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


def calibration_error(confidence: Floats, right: Bools) -> float:
    """Expected calibration error over 15 equal bins of confidence."""
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bins, weights=confidence.astype(np.float64) - right, minlength=BINS)
    return float(np.abs(gaps).sum() / max(len(confidence), 1))


def accuracy_interval(right: Bools) -> list[float]:
    """Where, with 95 % confidence, the accuracy on a test will lie that has half as many examples.

    Of a hundred examples or fewer as many, of two hundred or fewer a hundred. A test is a sample too:
    Wilson's interval for the true accuracy would hold the accuracy of an equally large test in 83 % of
    cases only. The difference of two samples varies as if there were n m / (n + m) examples.
    """
    return share_interval(float(right.mean()), len(right), len(right))


def share_interval(share: float, worth: float, n: int) -> list[float]:
    """The same for a share measured on n examples that are worth so many independent answers."""
    test = max(min(n, 100), n / 2.0)
    known = worth * test / (n + test)
    square = _NORMAL_95**2
    centre = (share + square / (2.0 * known)) / (1.0 + square / known)
    spread = math.sqrt(share * (1.0 - share) / known + square / (4.0 * known * known))
    reach = _NORMAL_95 / (1.0 + square / known) * spread
    # Rounding must not leave the share itself outside.
    return [max(0.0, min(share, centre - reach)), min(1.0, max(share, centre + reach))]


def answer_threshold(confidence: Floats, right: Bools, wanted: float) -> float:
    """The lowest confidence from which the wanted share of answers is right; 0 if all may be given.

    Where no share is that good, just above the highest confidence seen.
    """
    if not len(right) or right.mean() >= wanted:
        return 0.0
    order = np.argsort(-confidence, kind="stable")
    # As if one more had been wrong: the best of many thresholds was lucky.
    share = np.cumsum(right[order]) / np.arange(2, len(order) + 2)
    sorted_confidence = confidence[order]
    # A threshold lies between two different confidences.
    ends = np.append(sorted_confidence[:-1] > sorted_confidence[1:], True)
    good = np.flatnonzero((share >= wanted) & ends)
    if not len(good):
        return float(np.nextafter(sorted_confidence[0], np.float32(2.0)))
    return float(sorted_confidence[good[-1]])


def suspects(probabilities: Floats, labels: NDArray[np.int64], most: int) -> list[tuple[int, int]]:
    """(row, label that it looks like) of examples whose label is doubtful, the most doubtful first.

    probabilities: (n, labels), held out. Confident learning (Northcutt et al. 2021): an example looks like
    another label if that label's probability is at least the mean it has on examples which bear it, and the
    highest of these.
    """
    n, count = probabilities.shape
    if not n:
        return []
    rows = np.arange(n)
    own = probabilities[rows, labels]
    sizes = np.bincount(labels, minlength=count)
    usual = np.bincount(labels, weights=own, minlength=count) / np.maximum(sizes, 1)
    usual[sizes == 0] = np.inf
    likely = np.where(probabilities >= usual, probabilities, np.float32(-1.0))
    other = likely.argmax(axis=1)
    margin = likely[rows, other] - own
    found = np.flatnonzero((other != labels) & (margin > 0.0) & (own < usual[labels]))
    found = found[np.argsort(-margin[found], kind="stable")][:most]
    return [(int(row), int(other[row])) for row in found]
