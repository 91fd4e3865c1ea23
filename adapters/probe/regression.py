"""Fits and measures a head that predicts a number: ridge regression in closed form, all strengths at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.heads.head import Head, directions_for
from adapters.heads.novelty import fit_region
from adapters.heads.scaling import scaling_of
from adapters.probe.cross_validation import FitInputs
from adapters.probe.solvers.leverage import LeftOut, left_out, spectrum_of
from models.arrays import Bools, Doubles, Floats, Integers

# Strengths assume rows of mean square length one and targets of variance one.
_STRENGTHS = 10.0 ** np.arange(-4.0, 4.25, 0.5)
# Strengths below 0.1 mean almost no noise, which few examples may suggest by chance. In a normal prior, each
# factor of ten below 0.1 is one standard deviation.
_LOG_PRIOR = -0.5 * np.minimum(np.log10(_STRENGTHS) + 1.0, 0.0) ** 2
_MIDDLE = int(np.argmin(np.abs(np.log10(_STRENGTHS))))
_FEWEST = 3  # groups; errors on fewer groups say nothing
_CLOSEST = 1e-7  # standard deviations of the targets; weights in single precision predict no closer
_FOLDS_HIDE = 1.5  # about the jackknife's deviation over the delta method's, if folds are left out
_FARTHEST = 20.0  # limit of the interval's half-width, in the log of the ratio, to keep its ends finite
_MOST_SUSPECTS = 50
_SUSPECT_DEVIATIONS = 4.0  # robust standard deviations, with many examples
_ALIKE = 1e-4  # median deviation over the root mean square; if lower, most errors are alike
_NORMAL_95 = 1.959964
_T_95 = {2: 4.302653, 3: 3.182446, 4: 2.776445, 5: 2.570582}


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The chosen strength, and its errors."""

    strength: int  # index into _STRENGTHS
    errors: Doubles  # (n,), each at the strength that is best without the row's group
    squared: float  # sum of squared errors on sampled rows at the chosen strength
    without: Doubles  # (groups,), the same sum if the group did not exist, at the strength that is then best


def fit_ridge(data: FitInputs, values: Doubles) -> tuple[Head, dict[str, Any], Floats]:
    """Return head, report and scores (n,), as in FittedProbe, for rows in canonical order.

    Errors are exact errors on left-out groups; only sampled rows count. The strength with the lowest error is
    chosen. The reported errors are not at that strength, because the lowest of many is too low: each one is
    at the strength that is best without the row's own group.
    """
    embeddings = data.embeddings
    together = np.zeros(len(embeddings), dtype=np.int64)
    region = fit_region(embeddings, together, data.folds, directions_for(1, embeddings.shape[1]))
    scaling = scaling_of(embeddings)
    features = scaling.apply(embeddings, into=embeddings)
    mean, scale = float(values.mean()), float(values.std()) or 1.0
    standard = (values - mean) / scale
    spectrum = spectrum_of(features, data.memory_bytes // 4)
    place = _MIDDLE
    report: dict[str, Any] = {"r2": None, "r2_interval": None, "rmse": None, "method": "not measured"}
    report |= {"suspects": [], "suspects_total": 0, "warnings": []}
    scores = np.full(len(values), np.nan, dtype=np.float32)
    measured = len(np.unique(data.groups[data.sampled])) >= _FEWEST
    if measured:
        left = left_out(spectrum, standard, _STRENGTHS, data.groups, data.sampled, data.folds)
        chosen = _choose(left, data.groups, data.sampled)
        place = chosen.strength
        errors = chosen.errors[data.sampled]
        report |= _explained(chosen, left, spectrum.shrinkage(_STRENGTHS)[:, place], standard, data)
        report |= {"rmse": float(np.sqrt(np.mean(errors**2))) * scale, "method": _method(left, data.groups)}
        report |= _suspects(left.errors[:, place], values, scale, np.flatnonzero(data.sampled))
        # Squared errors are capped at the largest single-precision number.
        scores[data.sampled] = -np.minimum((errors * scale) ** 2, float(np.finfo(np.float32).max))
    weights, biases = spectrum.weights(standard, _STRENGTHS[place : place + 1])
    head = Head(
        task="regression",
        fingerprint=data.fingerprint,
        labels=(),
        scaling=scaling,
        weight=np.ascontiguousarray(weights.T.astype(np.float32)),
        bias=biases.astype(np.float32),
        region=region,
        value_mean=mean,
        value_scale=scale,
        residual_deviation=report["rmse"] or 0.0,
        measured=measured,
    )
    return head, {**report, "strength": float(_STRENGTHS[place])}, scores


def _choose(left: LeftOut, groups: Integers, sampled: Bools) -> _Chosen:
    own = np.unique(groups[sampled])
    # Groups without a sampled row are learned from but not measured on.
    judging = np.isin(groups, own)
    members = np.searchsorted(own, groups[judging])
    rows = int(sampled.sum())
    squared = np.maximum((left.errors[sampled] ** 2).sum(axis=0), rows * _CLOSEST**2)
    without = np.maximum(squared + _sums(members, left.changes[judging], len(own)), _CLOSEST * squared)
    best = int((_LOG_PRIOR - 0.5 * len(own) * np.log(squared)).argmax())
    # Second-order changes say nothing at strengths whose predictions vary more than the noise itself.
    told = (left.variance <= 1.0) | (np.arange(len(squared)) == best)
    prior = np.where(told, _LOG_PRIOR, -np.inf)
    others = (prior - 0.5 * (len(own) - 1) * np.log(without)).argmax(axis=1)
    errors = left.errors[:, best].copy()
    errors[judging] = left.errors[judging, others[members]]
    return _Chosen(best, errors, float(squared[best]), without[np.arange(len(own)), others])


def _explained(
    chosen: _Chosen, left: LeftOut, shrinkage: Doubles, standard: Doubles, data: FitInputs
) -> dict[str, Any]:
    """Return R² and the 95 % interval of the head's R²; nothing if the sampled targets are all alike.

    The interval is symmetric in the log of the ratio of mean squared error to variance. Its deviation is the
    larger of two: the delta method's, which ignores that errors share examples, and the jackknife's over
    groups, which errs on the large side (Efron and Stein, Annals of Statistics 9, 1981). Student's quantiles
    have one degree of freedom less than there are groups. Left-out errors are those of heads like this one on
    average. If this head was lucky or unlucky with the noise of its targets, the errors deviate the other
    way, so twice the deviation of that luck is added in quadrature.
    """
    members = np.unique(data.groups[data.sampled], return_inverse=True)[1]
    count, rows = len(chosen.without), len(members)
    errors, targets = chosen.errors[data.sampled], standard[data.sampled]
    targets = targets - targets.mean()
    spread = float((targets**2).sum())
    if spread <= rows * _CLOSEST**2:
        return {}
    total = max(float((errors**2).sum()), rows * _CLOSEST**2)
    ratio = total / rows / (spread / (rows - 1))
    terms = np.bincount(members, weights=errors**2 / total - targets**2 / spread)
    # Leaving a group out takes this much from the sum of squares about the mean.
    sizes, sums = np.bincount(members), np.bincount(members, weights=targets)
    gone = np.bincount(members, weights=targets**2) + sums**2 / (rows - sizes)
    others = chosen.without / chosen.squared + gone / spread
    delta = math.sqrt(count * float(terms.var()) * count / (count - 1))
    jackknife = math.sqrt((count - 1) * float(others.var()))
    known = max(delta, jackknife)
    variance = float(left.variance[chosen.strength])
    if left.folds:
        known *= _FOLDS_HIDE
        # Errors of one group are alike, which reduces the effective number of examples by this factor.
        variance *= max(1.0, float((np.bincount(members, weights=errors) ** 2).sum()) / total)
    freedom = (1.0 + (shrinkage**2).sum()) ** 2 / (1.0 + (shrinkage**4).sum())
    luck = variance / (1.0 + variance) * math.sqrt(2.0 / freedom)
    reach = min(_t_95(count - 1) * math.hypot(known, 2.0 * luck), _FARTHEST)
    # Errors at one common strength are slightly too low, those at a strength per group slightly too high.
    better = ratio * min(1.0, chosen.squared / total)
    interval = [1.0 - ratio * math.exp(reach), 1.0 - better * math.exp(-reach)]
    return {"r2": 1.0 - ratio, "r2_interval": interval, "warnings": _warnings(interval)}


def _sums(groups: Integers, columns: Doubles, count: int) -> Doubles:
    """Return the sums (count, k) of columns (n, k) over groups (n,) in 0..count-1."""
    return np.stack([np.bincount(groups, weights=one, minlength=count) for one in columns.T], axis=1)


def _t_95(freedom: int) -> float:
    """Return the 97.5th percentile of Student's t-distribution, to 0.002 (Abramowitz and Stegun 26.7.5)."""
    if freedom in _T_95:
        return _T_95[freedom]
    z = _NORMAL_95
    first = (z**3 + z) / 4.0
    second = (5.0 * z**5 + 16.0 * z**3 + 3.0 * z) / 96.0
    third = (3.0 * z**7 + 19.0 * z**5 + 17.0 * z**3 - 15.0 * z) / 384.0
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _method(left: LeftOut, groups: Integers) -> str:
    if left.folds:
        return f"{left.folds}-fold out-of-fold"
    return "leave-one-out" if int(np.bincount(groups).max()) == 1 else "leave-one-group-out"


def _warnings(interval: list[float]) -> list[dict[str, str]]:
    if interval[0] > 0.0:
        return []
    detail = (
        "These examples do not show that the predictions are better than always answering the mean of the "
        "targets; send more examples, or look at the suspects."
    )
    return [{"code": "no_better_than_mean", "detail": detail}]


def _suspects(errors: Doubles, values: Doubles, scale: float, rows: Integers) -> dict[str, Any]:
    """Return the rows whose error is an outlier, the most extreme first: their targets are probably wrong.

    Deviations are from the median error, in units of 1.4826 median absolute deviations, or of 1.2533 mean
    absolute deviations if most errors are alike (Iglewicz and Hoaglin, How to Detect and Handle Outliers,
    1993). Few examples leave that unit uncertain, so their limit is higher.
    """
    apart = np.abs(errors[rows] - np.median(errors[rows]))
    unit = 1.4826 * float(np.median(apart))
    if unit < _ALIKE * float(np.sqrt(np.mean(apart**2))):
        unit = 1.2533 * float(apart.mean())
    # Rounding to single precision must not look like a mistake in a target.
    deviations = apart / max(unit, 10.0 * _CLOSEST)
    out = np.flatnonzero(deviations > _SUSPECT_DEVIATIONS * (1.0 + 5.0 / len(rows)))
    out = out[np.argsort(-deviations[out], kind="stable")]
    suspects = [
        {
            "index": int(rows[place]),
            "target": float(values[rows[place]]),
            "looks_like": float(values[rows[place]] - errors[rows[place]] * scale),
            "deviations": float(deviations[place]),
        }
        for place in out[:_MOST_SUSPECTS]
    ]
    return {"suspects": suspects, "suspects_total": len(out)}
