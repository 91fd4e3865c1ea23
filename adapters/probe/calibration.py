"""Calibration from out-of-fold predictions: confidence, intervals, abstention and suspect labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from models.arrays import Bools, Floats

BINS = 15
_NORMAL_95 = 1.959964
# Steepest power of the number of examples with which errors fall (0.09 to 0.37 on nine sets).
_LEARNING_POWER = 0.37
# Prior on the spread of calibrated logits. It is the same for every strength of regularisation (measured on
# nine sets, 2 to 40 examples of each of 2 to 14 labels).
_USUAL_SPREAD = 0.1  # for two labels with one example each
_SPREAD_POWER_OF_EXAMPLES = 0.6  # exponent of the examples per label
_SPREAD_POWER_OF_LABELS = 1.2  # exponent of the number of labels
_LARGEST_USUAL_SPREAD = 2.5
_SPREAD_DEVIATION = 0.8  # standard deviation of the log of the spread
# Exponent with which calibrated slopes grow with the number of training examples.
_SLOPE_POWER = 0.25
# Spread of logits on unseen inputs, with one example of each label and the usual strength.
_SPREAD_UNSEEN = 0.2
# The usual slope of multilabel logits is one at this strength and grows with the strength.
_USUAL_STRENGTH = 0.03
_STRENGTH_POWER = 0.3
_SLOPE_DEVIATION = 0.7  # standard deviation of the prior on slopes (on their log for multilabel)
# Weight of the mean confidence against counted answers, in answers.
_CALIBRATED_EXAMPLES = 50.0
# Number of logits that a temperature is fitted on; more do not change it.
_MOST_LOGITS = 1 << 21


@dataclass(frozen=True, slots=True)
class Blend:
    """The weights with which two classifiers' logits are added: slope x first + other x second + priors."""

    slope: float
    other: float
    loss: float  # mean over the held-out examples
    stretch: float = 1.0  # spread of the scaled first logits over the usual spread


def blend(logits: Floats, others: Floats, priors: Floats, labels: NDArray[np.int64], usual: float) -> Blend:
    """Fit the slopes that multiply two classifiers' logits before these are added to the log priors.

    `logits`, `others`: (labels, m), of the same held-out examples, as if labels were equally frequent.
    `priors`: (labels,). `labels`: (m,). `usual`: spread of calibrated logits.
    The slopes suit classifiers fitted on the training folds; `grown` adjusts them to all examples.
    The method is stacking (Wolpert 1992) with two numbers, by Newton's method. A prior draws the log of the
    first slope to the usual one, so that it is never zero, and the other slope to zero. The prior matters
    for few examples only.
    """
    if not len(labels):
        return Blend(usual / _SPREAD_UNSEEN, 0.0, 0.0)
    step = max(1, logits.size // _MOST_LOGITS)
    first, second, own = logits[:, ::step], others[:, ::step], labels[::step]
    # These slopes give both classifiers' logits the usual spread.
    unit, other_unit = usual / _spread(first), usual / _spread(second)
    right = np.stack([logit[own, np.arange(len(own))] for logit in (first, second)])
    offset = float(priors[own].sum(dtype=np.float64))
    tight = 1.0 / _SPREAD_DEVIATION**2

    def measure(place: float, other: float) -> tuple[float, float, tuple[float, float], _Curvature]:
        """Return objective, loss, gradient and curvature with respect to the log of the slope and `other`."""
        slope = unit * math.exp(place)
        slopes = slope, other_unit * other
        loss, (one, two), (aa, ab, bb) = _blended(first, second, priors, right, offset, slopes)
        # The curvature by the log may be negative if the slope should fall; half of its first term is safe.
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
    """Return the prior root mean square of logits around their mean over labels.

    `per_label`: examples per label.
    """
    grown = max(per_label, 1.0) ** _SPREAD_POWER_OF_EXAMPLES * (labels / 2.0) ** _SPREAD_POWER_OF_LABELS
    return float(min(_USUAL_SPREAD * grown, _LARGEST_USUAL_SPREAD))


def grown(found: Blend, trained_share: float) -> Blend:
    """Return the slopes for classifiers fitted on all examples instead of on `trained_share` of them.

    More examples make them right more often, as measured on the same sets as the usual spread.
    """
    more = trained_share**-_SLOPE_POWER
    return replace(found, slope=found.slope * more, other=found.other * more)


def temperature(logits: Floats, labels: NDArray[np.int64]) -> tuple[float, float]:
    """Return the temperature of one classifier's logits (n, labels), and the mean loss (Guo et al. 2017).

    A network is trained to be calibrated, so a prior draws the slope, one over the temperature, to one. The
    prior matters for few examples only. Solved by Newton's method.
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
            # The step was too long: go half way back to the best slope.
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
    """Return the root mean square of logits (labels, m) around their mean over labels; one if 0 or empty."""
    if not logits.size:
        return 1.0
    centred = logits - logits.mean(axis=0)
    spread = math.sqrt(float(np.vdot(centred, centred)) / centred.size)
    return spread if spread > 1e-6 else 1.0


def _newton(other: float, gradient: tuple[float, float], curvature: _Curvature) -> tuple[float, float]:
    """Return the Newton step of two numbers, the second of which must not become negative."""
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
    """Return the summed cross-entropy of the blended logits, its gradient, and its Hessian's three numbers.

    `right`: (2, m), both logits of each example's own label. `offset`: the sum of these labels' priors.
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


def smoothing(held_out: int) -> float:
    """Return the share of probability to spread evenly, so that none exceeds what the examples support.

    It is the probability that the next answer is wrong after `held_out` right ones in a row: the posterior
    mean under Jeffreys' prior (Brown, Cai and DasGupta 2001).
    """
    return 0.5 / (held_out + 1.0)


def calibration_error(confidence: Floats, right: Bools) -> float:
    """Return the expected calibration error over 15 equal bins of confidence."""
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bins, weights=confidence.astype(np.float64) - right, minlength=BINS)
    return float(np.abs(gaps).sum() / max(len(confidence), 1))


def accuracy_interval(
    right: Bools, *, groups: int | None = None, unmeasured: int = 0, trained_share: float = 1.0
) -> list[float]:
    """Return the 95 % interval of the accuracy on a test set with half as many examples.

    The test set has 100 examples if n is 100 to 200, and n examples if n is less. It is a sample too:
    Wilson's interval for the true accuracy would hold the accuracy on an equally large test set in only 83 %
    of cases. The difference of samples of n and m examples varies as if there were n m / (n + m) examples.

    `right`: (n,), n > 0, of held-out examples. `groups`: number of groups they form, since copies add no
    information. `unmeasured`: further examples that could not be held out, each the only one of its label;
    they may be as easy as the others, or all be wrong. `trained_share`: share of the examples that was
    trained on when one was held out. With all of them errors fall by the power law of learning curves
    (Hestness et al. 2017), at most as steeply as on the measured sets.
    """
    n = len(right)
    known = n if groups is None else groups
    lower, _ = share_interval(float(right.sum()) / (n + unmeasured), known + unmeasured, known + unmeasured)
    _, upper = share_interval(float(right.mean()), known, known)
    return [lower, 1.0 - (1.0 - upper) * trained_share**_LEARNING_POWER]


def share_interval(share: float, worth: float, n: int) -> list[float]:
    """Return the same interval for a share measured on n examples, worth `worth` independent answers."""
    test = max(min(n, 100), n / 2.0)
    known = worth * test / (n + test)
    square = _NORMAL_95**2
    centre = (share + square / (2.0 * known)) / (1.0 + square / known)
    spread = math.sqrt(share * (1.0 - share) / known + square / (4.0 * known * known))
    reach = _NORMAL_95 / (1.0 + square / known) * spread
    # Rounding must not exclude the share itself.
    return [max(0.0, min(share, centre - reach)), min(1.0, max(share, centre + reach))]


def answer_threshold(confidence: Floats, right: Bools, wanted: float) -> float:
    """Return the lowest confidence from which the wanted share of answers is expected to be right.

    `confidence`, `right`: (m,), of held-out examples. The expected share is the mean confidence, which is
    calibrated; the counted share takes over as answers grow in number. Returns 0 if all may be answered. If
    no threshold reaches `wanted`, returns `wanted` or just above the highest confidence, whichever is higher.
    """
    if not len(right):
        return wanted
    order = np.argsort(-confidence, kind="stable")
    sorted_confidence = confidence[order]
    answered = np.arange(1, len(order) + 1)
    sure, hits = np.cumsum(sorted_confidence, dtype=np.float64), np.cumsum(right[order])
    share = (_CALIBRATED_EXAMPLES * sure / answered + hits) / (_CALIBRATED_EXAMPLES + answered)
    # A threshold can only lie between two different confidences.
    ends = np.append(sorted_confidence[:-1] > sorted_confidence[1:], True)
    good = np.flatnonzero((share >= wanted) & ends)
    if not len(good):
        return max(wanted, float(np.nextafter(sorted_confidence[0], np.float32(2.0))))
    return 0.0 if good[-1] == len(order) - 1 else float(sorted_confidence[good[-1]])


def suspects(probabilities: Floats, labels: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return (row, label that it looks like) of examples with a doubtful label, the most doubtful first.

    `probabilities`: (n, labels), held out. Confident learning (Northcutt et al. 2021): an example looks like
    the most probable of the labels whose probability is at least their mean on the examples that bear them.
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
