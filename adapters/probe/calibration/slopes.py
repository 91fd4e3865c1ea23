"""The slopes with which the logits of classifiers, and those of label names, are blended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from models.arrays import Doubles, Floats, Integers

# Prior on the spread of calibrated logits. It is the same for every strength of regularisation (measured on
# nine sets, 2 to 40 examples of each of 2 to 14 labels).
_USUAL_SPREAD = 0.1  # for two labels with one example each
_SPREAD_POWER_OF_EXAMPLES = 0.6  # exponent of the examples per label
_SPREAD_POWER_OF_LABELS = 1.2  # exponent of the number of labels
_MOST_LABELS = 14  # more do not make the usual spread larger
_LARGEST_USUAL_SPREAD = 2.5
# Exponent with which calibrated slopes grow with the number of training examples.
_SLOPE_POWER = 0.25
# Spread of logits on unseen inputs, with one example of each label and the usual strength.
_SPREAD_UNSEEN = 0.2
# Priors of a blend's numbers: the log of the first slope over the usual one, the second slope in units of the
# usual one, and the slope of names, whose logits have the scale that is usual for names.
_USUAL_PLACES = (0.0, 0.0, 1.0)
_DEVIATIONS = (0.8, 0.8, 1.0)
_NAMES_ODDS = 2.0  # of names that mean what they say against names that mean nothing
# Number of logits that a temperature is fitted on; more do not change it.
MOST_LOGITS = 1 << 21


@dataclass(frozen=True, slots=True)
class Blend:
    """The weights with which logits are added: slope x first + other x second + named x names + priors."""

    slope: float
    other: float
    named: float
    loss: float  # mean over the held-out examples
    stretch: float  # spread of the scaled first logits over the usual spread


def blend(
    logits: Floats,
    others: Floats,
    priors: Floats,
    labels: Integers,
    usual: float,
    names: Floats | None = None,
) -> Blend:
    """Fit the slopes that multiply two classifiers' logits before these are added to the log priors.

    `logits`, `others`: (labels, m), of the same held-out examples, as if labels were equally frequent; zero
    for examples that only names can tell. `priors`: (labels,). `labels`: (m,). `usual`: spread of calibrated
    logits. `names`: (labels, m), logits of label names, which have learned nothing from the examples.
    The slopes suit classifiers fitted on the training folds; `grown` adjusts them to all examples.
    The method is stacking (Wolpert 1992) with two or three numbers, by Newton's method. A prior draws the log
    of the first slope to the usual one, so that it is never zero, the second slope to zero, and that of names
    to one. The prior matters for few examples only.
    Names may also mean nothing. The slopes without them are mixed in by how much more probable they make the
    examples (Bayesian model averaging, Hoeting et al. 1999).
    """
    members = [logits, others] if names is None else [logits, others, names]
    found, evidence = _fitted(members, priors, labels, usual)
    if names is None:
        return found
    without, other_evidence = _fitted(members[:2], priors, labels, usual)
    share = 1.0 / (1.0 + math.exp(min(evidence - other_evidence, 700.0)) / _NAMES_ODDS)

    def mixed(one: float, other: float) -> float:
        return share * one + (1.0 - share) * other

    return Blend(
        slope=math.exp(mixed(math.log(found.slope), math.log(without.slope))),
        other=mixed(found.other, without.other),
        named=mixed(found.named, 0.0),
        loss=mixed(found.loss, without.loss),
        stretch=mixed(found.stretch, without.stretch),
    )


def _fitted(members: Sequence[Floats], priors: Floats, labels: Integers, usual: float) -> tuple[Blend, float]:
    """Return the slopes of two or three members, and the negative log of their posterior density."""
    size = len(members)
    usuals = np.array(_USUAL_PLACES[:size])
    # These slopes give both classifiers' logits the usual spread.
    spreads = _spread(members[0], _SPREAD_UNSEEN), _spread(members[1], 1.0)
    units = np.array([usual / spreads[0], usual / spreads[1], 1.0][:size])
    if not len(labels):
        return _blend_of(units, usuals, 0.0), 0.0
    step = max(1, members[0].size // MOST_LOGITS)
    members, own = [member[:, ::step] for member in members], labels[::step]
    right = np.stack([member[own, np.arange(len(own))] for member in members])
    offset = float(priors[own].sum(dtype=np.float64))
    tight = np.array(_DEVIATIONS[:size]) ** -2.0
    diagonal = np.arange(size)

    def measure(place: Doubles) -> tuple[float, float, Doubles, Doubles]:
        """Return objective, loss, gradient and curvature by the log of the first slope and the others."""
        scale = units.copy()
        scale[0] *= math.exp(place[0])
        slopes = scale * place
        slopes[0] = scale[0]
        loss, gradient, curvature = blended_loss(members, priors, right, offset, slopes)
        gradient *= scale
        curvature *= np.outer(scale, scale)
        # The curvature by the log may be negative if the slope should fall; half of its first term is safe.
        curvature[0, 0] = max(curvature[0, 0] + gradient[0], 0.5 * curvature[0, 0])
        curvature[diagonal, diagonal] += tight
        apart = place - usuals
        return loss + 0.5 * float(tight @ apart**2), loss, gradient + tight * apart, curvature

    place = usuals
    value, loss, gradient, curvature = measure(place)
    for _ in range(15):
        move = _newton(place, gradient, curvature)
        promised = -0.5 * float(gradient @ move)
        if promised < 1e-4 * len(own):
            break
        length = min(1.0, 1.0 / max(abs(float(move[0])), 1e-9))
        for _ in range(6):
            there = place + length * move
            there[1:] = np.maximum(there[1:], 0.0)
            found = measure(there)
            if found[0] <= value:
                break
            length *= 0.4
        else:
            break
        drop, place = value - found[0], there
        value, loss, gradient, curvature = found
        if drop < 1e-4 * len(own):
            break
    return _blend_of(units, place, loss / len(own)), value


def _blend_of(units: Doubles, place: Doubles, loss: float) -> Blend:
    stretch = math.exp(place[0])
    named = float(place[2]) if len(place) > 2 else 0.0
    return Blend(float(units[0]) * stretch, float(units[1] * place[1]), named, loss, stretch)


def usual_spread(labels: int, per_label: float) -> float:
    """Return the prior root mean square of logits around their mean over labels.

    `per_label`: examples per label.
    """
    grown = (
        max(per_label, 1.0) ** _SPREAD_POWER_OF_EXAMPLES
        * (min(labels, _MOST_LABELS) / 2.0) ** _SPREAD_POWER_OF_LABELS
    )
    return float(min(_USUAL_SPREAD * grown, _LARGEST_USUAL_SPREAD))


def grown(found: Blend, trained_share: float) -> Blend:
    """Return the slopes for classifiers fitted on all examples instead of on `trained_share` of them.

    More examples make them right more often, as measured on the same sets as the usual spread.
    """
    more = trained_share**-_SLOPE_POWER
    return replace(found, slope=found.slope * more, other=found.other * more)


def _spread(logits: Floats, without: float) -> float:
    """Return the root mean square of logits (labels, m) around their mean over labels.

    Examples whose logits are all zero say nothing. `without`: returned if no other ones are left.
    """
    said = logits.any(axis=0)
    count = int(said.sum()) * len(logits)
    if not count:
        return without
    centred = logits - logits.mean(axis=0)
    spread = math.sqrt(float(np.vdot(centred, centred)) / count)
    return spread if spread > 1e-6 else 1.0


def _newton(place: Doubles, gradient: Doubles, curvature: Doubles) -> Doubles:
    """Return the Newton step of numbers, of which all but the first must not become negative."""
    move = np.zeros(len(place))
    fixed = (place <= 0.0) & (gradient >= 0.0)
    fixed[0] = False
    while True:
        free = ~fixed
        pull = gradient + curvature @ np.where(fixed, move, 0.0)
        move[free] = -np.linalg.solve(curvature[np.ix_(free, free)], pull[free])
        below = free & (place + move < 0.0)
        below[0] = False
        if not below.any():
            return move
        move[below] = -place[below]
        fixed |= below


def blended_loss(
    members: Sequence[Floats], priors: Floats, right: Floats, offset: float, slopes: Doubles
) -> tuple[float, Doubles, Doubles]:
    """Return the summed cross-entropy of the blended logits, its gradient (k,), and its Hessian (k, k).

    `members`: k logits (labels, m). `right`: (k, m), the logits of each example's own label. `offset`: the
    sum of these labels' priors.
    """
    chances = np.float32(slopes[0]) * members[0]
    for slope, member in zip(slopes[1:], members[1:], strict=True):
        chances += np.float32(slope) * member
    chances += priors[:, None]
    top = chances.max(axis=0)
    chances -= top
    loss = top - slopes.astype(np.float32) @ right
    np.exp(chances, out=chances)
    total = chances.sum(axis=0)
    loss += np.log(total)
    chances /= total
    weighted = [chances * member for member in members]
    means = np.stack([one.sum(axis=0) for one in weighted])
    gradient = (means - right).sum(axis=1, dtype=np.float64)
    count = len(members)
    curvature = np.empty((count, count))
    for row in range(count):
        for column in range(row, count):
            product = float(np.vdot(weighted[row], members[column])) - float(
                np.vdot(means[row], means[column])
            )
            curvature[row, column] = curvature[column, row] = product
    return float(loss.sum(dtype=np.float64)) - offset, gradient, curvature
