"""The slopes with which the logits of two classifiers are blended."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from models.arrays import Floats, Integers

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
# Number of logits that a temperature is fitted on; more do not change it.
MOST_LOGITS = 1 << 21


@dataclass(frozen=True, slots=True)
class Blend:
    """The weights with which two classifiers' logits are added: slope x first + other x second + priors."""

    slope: float
    other: float
    loss: float  # mean over the held-out examples
    stretch: float = 1.0  # spread of the scaled first logits over the usual spread


def blend(logits: Floats, others: Floats, priors: Floats, labels: Integers, usual: float) -> Blend:
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
    step = max(1, logits.size // MOST_LOGITS)
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
        loss, (one, two), (aa, ab, bb) = blended_loss(first, second, priors, right, offset, slopes)
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


def blended_loss(
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
