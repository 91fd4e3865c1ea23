"""Measures from held-out answers: intervals, calibration error, threshold and suspect labels."""

from __future__ import annotations

import math

import numpy as np

from models.arrays import Bools, Floats, Integers

BINS = 15
_NORMAL_95 = 1.959964
# Steepest power of the number of examples with which errors fall (0.09 to 0.37 on nine sets).
_LEARNING_POWER = 0.37
# Weight of the mean confidence against counted answers, in answers.
_CALIBRATED_EXAMPLES = 50.0


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


def suspects(probabilities: Floats, labels: Integers) -> list[tuple[int, int]]:
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
