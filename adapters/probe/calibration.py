"""What out-of-fold predictions say: how sure to be, when to keep silent, which labels to doubt."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from models.arrays import Bools, Floats

BINS = 15
_NORMAL_95 = 1.959964
# Errors fall at most with this power of the number of examples (0.09 to 0.37 on nine sets).
_LEARNING_POWER = 0.37
# Before examples are seen: the spread of logits that are right about how sure to be, of two labels and of one
# example each, how it grows with both, and the standard deviation of its log. It is the same for every
# strength of regularisation (measured on nine sets, 2 to 40 examples of each of 2 to 14 labels).
_USUAL_SPREAD = 0.1
_SPREAD_POWER_OF_EXAMPLES = 0.6
_SPREAD_POWER_OF_LABELS = 1.2
_LARGEST_USUAL_SPREAD = 2.5
_SPREAD_DEVIATION = 0.8
# How slopes grow with the examples that a classifier was fitted on.
_SLOPE_POWER = 0.25
# The spread of logits of unseen inputs, with one example of each label and the usual strength.
_SPREAD_UNSEEN = 0.2
# For multilabel heads, the usual slope grows with the strength of regularisation.
_USUAL_STRENGTH = 0.03
_STRENGTH_POWER = 0.3
_SLOPE_DEVIATION = 0.7
# Mean confidence counts as much as so many answers that were right or wrong.
_CALIBRATED_EXAMPLES = 50.0
# More logits than this do not move a temperature.
_MOST_LOGITS = 1 << 21


@dataclass(frozen=True, slots=True)
class Blend:
    """How two classifiers' logits are added: slope x first + other x second + priors, and the mean loss.

    stretch: the first logits' spread then, over what is usual.
    """

    slope: float
    other: float
    loss: float
    stretch: float = 1.0


def blend(logits: Floats, others: Floats, priors: Floats, labels: NDArray[np.int64], usual: float) -> Blend:
    """The slopes by which to multiply two classifiers' logits before adding them to the log priors.

    logits, others: (labels, m) of the same examples held out, as if labels were equally frequent. priors:
    (labels,). labels: (m,). usual: the spread of logits that are right about how sure to be.
    The slopes are for classifiers fitted on as few; see grown.
    Stacking (Wolpert 1992) with two numbers, by Newton's method. The first slope is never zero: its log is
    drawn to what is usual, and so is the other towards zero, which matters for few examples only.
    """
    if not len(labels):
        return Blend(usual / _SPREAD_UNSEEN, 0.0, 0.0)
    step = max(1, logits.size // _MOST_LOGITS)
    first, second, own = logits[:, ::step], others[:, ::step], labels[::step]
    # In units in which one is the usual spread, of both.
    unit, other_unit = usual / _spread(first), usual / _spread(second)
    right = np.stack([logit[own, np.arange(len(own))] for logit in (first, second)])
    offset = float(priors[own].sum(dtype=np.float64))
    tight = 1.0 / _SPREAD_DEVIATION**2

    def measure(place: float, other: float) -> tuple[float, float, tuple[float, float], _Curvature]:
        """The objective, the loss, and both derivatives, by the log of the slope and by the other."""
        slope = unit * math.exp(place)
        slopes = slope, other_unit * other
        loss, (one, two), (aa, ab, bb) = _blended(first, second, priors, right, offset, slopes)
        # Where the slope should fall, the curvature by its log may be negative; half of it is safe.
        by_log = max(slope * slope * aa + slope * one, 0.5 * slope * slope * aa)
        gradient = slope * one + tight * place, other_unit * two + tight * other
        curvature = by_log + tight, slope * other_unit * ab, other_unit * other_unit * bb + tight
        return loss + 0.5 * tight * (place * place + other * other), loss, gradient, curvature

    place, other = 0.0, 0.0
    value, loss, gradient, curvature = measure(place, other)
    for _ in range(15):
        move = _newton(other, gradient, curvature)
        promised = -0.5 * (gradient[0] * move[0] + gradient[1] * move[1])
        if promised < 1e-4 * len(own):
            break
        length = min(1.0, 1.0 / max(abs(move[0]), 1e-9))
        for _ in range(6):
            there = place + length * move[0], max(other + length * move[1], 0.0)
            found = measure(*there)
            if found[0] <= value:
                break
            length *= 0.4
        else:
            break
        drop, (place, other) = value - found[0], there
        value, loss, gradient, curvature = found
        if drop < 1e-4 * len(own):
            break
    return Blend(unit * math.exp(place), other_unit * other, loss / len(own), math.exp(place))


def usual_spread(labels: int, per_label: float) -> float:
    """Root mean square of logits around their mean over labels, before examples are seen."""
    grown = max(per_label, 1.0) ** _SPREAD_POWER_OF_EXAMPLES * (labels / 2.0) ** _SPREAD_POWER_OF_LABELS
    return float(min(_USUAL_SPREAD * grown, _LARGEST_USUAL_SPREAD))


def grown(found: Blend, trained_share: float) -> Blend:
    """The slopes for classifiers fitted on all examples, not on that share: they are right more often.

    How much more was measured on the sets of the usual spread.
    """
    more = trained_share**-_SLOPE_POWER
    return replace(found, slope=found.slope * more, other=found.other * more)


def temperature(logits: Floats, labels: NDArray[np.int64]) -> tuple[float, float]:
    """The temperature of one classifier's logits (n, labels), and the mean loss at it (Guo et al. 2017).

    A network's logits are trained to be right about how sure to be: the slope, one over the temperature, is
    drawn to one, which matters for few examples only. Newton's method.
    """
    step = max(1, logits.size // _MOST_LOGITS)
    columns, own = np.ascontiguousarray(logits[::step].T), labels[::step]
    if not len(own):
        return 1.0, 0.0
    nothing, flat = np.zeros_like(columns), np.zeros(len(columns), dtype=np.float32)
    right = np.stack([columns[own, np.arange(len(own))], np.zeros(len(own), dtype=np.float32)])
    tight = 1.0 / _SLOPE_DEVIATION**2
    slope = best = 1.0
    value = loss = math.inf
    for _ in range(20):
        found, (one, _), (aa, _, _) = _blended(columns, nothing, flat, right, 0.0, (slope, 0.0))
        objective = found + 0.5 * tight * (slope - 1.0) ** 2
        if objective > value + 1e-9:
            # Too far: half way back to the best so far.
            slope = 0.5 * (slope + best)
            continue
        drop, best, value, loss = value - objective, slope, objective, found
        gradient, curvature = one + tight * (slope - 1.0), aa + tight
        if min(drop, 0.5 * gradient**2 / curvature) < 1e-4 * len(own):
            break
        slope = max(slope - gradient / curvature, 1e-3)
    return 1.0 / best, loss / len(own)


_Curvature = tuple[float, float, float]


def _spread(logits: Floats) -> float:
    """Root mean square around the mean over labels, (labels, m); one where there is nothing."""
    if not logits.size:
        return 1.0
    centred = logits - logits.mean(axis=0)
    spread = math.sqrt(float(np.vdot(centred, centred)) / centred.size)
    return spread if spread > 1e-6 else 1.0


def _newton(other: float, gradient: tuple[float, float], curvature: _Curvature) -> tuple[float, float]:
    """The step of two numbers of which the second stays zero or more."""
    (one, two), (aa, ab, bb) = gradient, curvature
    if other <= 0.0 and two >= 0.0:
        return -one / aa, 0.0
    area = aa * bb - ab * ab
    if area <= 1e-6 * aa * bb:
        return -one / aa, max(-two / bb, -other)
    move = (ab * two - bb * one) / area, (ab * one - aa * two) / area
    return move if move[1] >= -other else (-(one - ab * other) / aa, -other)


def _blended(
    first: Floats,
    second: Floats,
    priors: Floats,
    right: Floats,
    offset: float,
    slopes: tuple[float, float],
) -> tuple[float, list[float], _Curvature]:
    """Summed cross-entropy of the blended logits, its gradient, and its Hessian's three numbers.

    right: (2, m), both logits of the own labels. offset: the sum of their priors.
    """
    chances = np.float32(slopes[0]) * first + np.float32(slopes[1]) * second
    chances += priors[:, None]
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
    return float(loss.sum(dtype=np.float64)) - offset, gradient, curvature


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


def smoothing(held_out: int) -> float:
    """The share of the probability to spread evenly, so that none is higher than examples can support.

    After so many right answers in a row the next one is wrong with this probability, if nothing was known
    of it before: the mean of the posterior from Jeffreys' prior (Brown, Cai and DasGupta 2001).
    """
    return 0.5 / (held_out + 1.0)


def calibration_error(confidence: Floats, right: Bools) -> float:
    """Expected calibration error over 15 equal bins of confidence."""
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bins, weights=confidence.astype(np.float64) - right, minlength=BINS)
    return float(np.abs(gaps).sum() / max(len(confidence), 1))


def accuracy_interval(
    right: Bools, *, groups: int | None = None, unmeasured: int = 0, trained_share: float = 1.0
) -> list[float]:
    """Where, with 95 % confidence, the accuracy on a test will lie that has half as many examples.

    Of a hundred examples or fewer as many, of two hundred or fewer a hundred. A test is a sample too:
    Wilson's interval for the true accuracy would hold the accuracy of an equally large test in 83 % of
    cases only. The difference of two samples varies as if there were n m / (n + m) examples.

    right: (m,), m > 0, of examples held out. groups: of how many groups they are, for copies say nothing
    new. unmeasured: further examples that could not be held out, each the only one of its label: they may be
    as easy as the others, or all be wrong. trained_share: how much of the examples was there when one was
    held out; with all of them errors are fewer by the power law of learning curves (Hestness et al. 2017),
    at most as steep as on the measured sets.
    """
    n = len(right)
    known = n if groups is None else groups
    lower, _ = share_interval(float(right.sum()) / (n + unmeasured), known + unmeasured, known + unmeasured)
    _, upper = share_interval(float(right.mean()), known, known)
    return [lower, 1.0 - (1.0 - upper) * trained_share**_LEARNING_POWER]


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
    """The lowest confidence from which the wanted share of answers is expected to be right; 0 if of all.

    confidence, right: (m,) of examples held out. What is expected is the mean confidence, which is
    calibrated, until so many are answered that their count says it better. Where no share is that good, what
    is wanted, above the highest confidence seen.
    """
    if not len(right):
        return wanted
    order = np.argsort(-confidence, kind="stable")
    sorted_confidence = confidence[order]
    answered = np.arange(1, len(order) + 1)
    sure, hits = np.cumsum(sorted_confidence, dtype=np.float64), np.cumsum(right[order])
    share = (_CALIBRATED_EXAMPLES * sure / answered + hits) / (_CALIBRATED_EXAMPLES + answered)
    # A threshold lies between two different confidences.
    ends = np.append(sorted_confidence[:-1] > sorted_confidence[1:], True)
    good = np.flatnonzero((share >= wanted) & ends)
    if not len(good):
        return max(wanted, float(np.nextafter(sorted_confidence[0], np.float32(2.0))))
    return 0.0 if good[-1] == len(order) - 1 else float(sorted_confidence[good[-1]])


def suspects(probabilities: Floats, labels: NDArray[np.int64]) -> list[tuple[int, int]]:
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
    found = found[np.argsort(-margin[found], kind="stable")]
    return [(int(row), int(other[row])) for row in found]
