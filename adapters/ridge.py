"""Fits and measures a head that predicts a number: ridge regression in closed form, all strengths at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.features import scaling_of
from adapters.head import Head, directions_for
from adapters.leverage import LeftOut, left_out, spectrum_of
from adapters.region import fit_region
from adapters.selection import Prepared

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]

# On rows of mean square length one and a target of unit variance.
_STRENGTHS = 10.0 ** np.arange(-4.0, 4.25, 0.5)
# Before examples are seen: strengths below 0.1 say that there is next to no noise, which few examples only
# seem to show. One tenth of them is one standard deviation less likely.
_LOG_PRIOR = -0.5 * np.minimum(np.log10(_STRENGTHS) + 1.0, 0.0) ** 2
_MIDDLE = int(np.argmin(np.abs(np.log10(_STRENGTHS))))
# Errors of fewer groups say nothing.
_FEWEST = 3
# Relative to the targets' deviation: weights in single precision predict no closer.
_CLOSEST = 1e-7
# By so much is the jackknife's deviation larger than what errors out of folds alone show of it.
_FOLDS_HIDE = 1.5
_MOST_SUSPECTS = 50
# Robust standard deviations from the median error, of many examples; more of few.
_SUSPECT_DEVIATIONS = 4.0
# Of their root mean square: errors of which half are within this of each other say nothing of the others.
_ALIKE = 1e-4
_NORMAL_95 = 1.959964
_T_95 = {2: 4.302653, 3: 3.182446, 4: 2.776445, 5: 2.570582}


@dataclass(frozen=True, slots=True)
class _Measured:
    """What the examples say of every strength, and of the one that is chosen.

    strength: its place. errors: (n,), of every row, at the strength that is best without its group. r2 and
    interval: None where all targets are alike.
    """

    strength: int
    errors: Doubles
    r2: float | None
    interval: list[float] | None


def fit_ridge(data: Prepared, values: Doubles) -> tuple[Head, dict[str, Any], Floats]:
    """Head, report and scores (n,) for rows in canonical order; see linear_probe.fit.

    Everything is measured on groups left out, exactly, of whose rows only those sampled count. The strength is
    the one with the lowest squared error there; what is reported of an example comes from the strength that
    would have been chosen without its group.
    """
    embeddings = data.embeddings
    together = np.zeros(len(embeddings), dtype=np.int64)
    region = fit_region(embeddings, together, data.folds, directions_for(1, embeddings.shape[1]))
    scaling = scaling_of(embeddings)
    features = scaling.apply(embeddings, into=embeddings)
    mean, scale = float(values.mean()), float(values.std()) or 1.0
    standard = (values - mean) / scale
    spectrum = spectrum_of(features, data.memory_bytes // 4)
    groups = np.unique(data.groups[data.sampled])
    found = None
    if len(groups) >= _FEWEST:
        left = left_out(spectrum, standard, _STRENGTHS, data.groups, data.sampled, data.folds)
        found = _measure(left, spectrum.shrinkage(_STRENGTHS), standard, data.groups, data.sampled)
    place = _MIDDLE if found is None else found.strength
    weights, biases = spectrum.weights(standard, _STRENGTHS[place : place + 1])
    scores = np.full(len(values), np.nan, dtype=np.float32)
    report: dict[str, Any] = {"strength": float(_STRENGTHS[place])}
    deviation = 0.0
    if found is None:
        report |= {"r2": None, "r2_interval": None, "rmse": None, "method": "not measured"}
        report |= {"suspects": [], "suspects_total": 0, "warnings": []}
    else:
        errors = found.errors * scale
        deviation = float(np.sqrt(np.mean(found.errors[data.sampled] ** 2))) * scale
        # A squared error beyond single precision is as bad as can be said.
        worst = float(np.finfo(np.float32).max)
        scores[data.sampled] = -np.minimum(errors[data.sampled] ** 2, worst)
        report |= {"r2": found.r2, "r2_interval": found.interval, "rmse": deviation}
        report |= {"method": _method(left, data.groups), "warnings": _warnings(found.interval)}
        report |= _suspects(left.errors[:, place], values, scale, np.flatnonzero(data.sampled))
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
        residual_deviation=deviation,
        measured=found is not None,
    )
    return head, report, scores


def _measure(
    left: LeftOut, shrinkage: Doubles, standard: Doubles, groups: Integers, sampled: NDArray[np.bool_]
) -> _Measured:
    own = np.unique(groups[sampled], return_inverse=True)[1]
    count = int(own.max()) + 1
    rows = np.flatnonzero(sampled)
    squared = np.maximum((left.errors[rows] ** 2).sum(axis=0), len(rows) * _CLOSEST**2)
    best = int((-0.5 * count * np.log(squared) + _LOG_PRIOR).argmax())
    # Squared errors (groups, strengths) in sum, had the group not been there.
    members = np.searchsorted(np.unique(groups[sampled]), groups)
    belongs = np.isin(groups, groups[sampled])
    changes = _sums(members[belongs], left.changes[belongs], count)
    without = np.maximum(squared + changes, 1e-9 * squared)
    chosen = (-0.5 * (count - 1) * np.log(without) + _LOG_PRIOR).argmax(axis=1)
    errors = left.errors[:, best].copy()
    errors[belongs] = left.errors[belongs, chosen[members[belongs]]]
    own_targets = standard[rows] - standard[rows].mean()
    spread = float((own_targets**2).sum())
    if spread <= len(rows) * _CLOSEST**2:
        return _Measured(best, errors, None, None)
    total = max(float((errors[rows] ** 2).sum()), len(rows) * _CLOSEST**2)
    ratio = total / len(rows) / (spread / (len(rows) - 1))
    influence = _sums(own, (errors[rows] ** 2 / total - own_targets**2 / spread)[:, None], count)[:, 0]
    # What a group takes with it of the sum of squares about the mean.
    sizes, sums = np.bincount(own), np.bincount(own, weights=own_targets)
    others = np.maximum(len(rows) - sizes, 1)
    taken = np.bincount(own, weights=own_targets**2) + sums**2 / others
    jackknife = (without[np.arange(count), chosen] - squared[best]) / squared[best] + taken / spread
    deviations = [
        math.sqrt(count / (count - 1) * float(((influence - influence.mean()) ** 2).sum())),
        math.sqrt((count - 1) / count * float(((jackknife - jackknife.mean()) ** 2).sum())),
    ]
    kept = shrinkage[:, best] ** 2
    freedom = (1.0 + kept.sum()) ** 2 / (1.0 + (kept**2).sum())
    # As if there were so many times fewer examples: errors of a group are alike.
    alike = float((np.bincount(own, weights=errors[rows]) ** 2).sum()) / total
    variance = left.variance[best] * (max(1.0, alike) if left.folds else 1.0)
    excess = variance / (1.0 + variance) * math.sqrt(2.0 / freedom)
    deviation = math.hypot((_FOLDS_HIDE if left.folds else 1.0) * max(deviations), 2.0 * excess)
    reach = min(_t_95(count - 1) * deviation, 20.0)
    # A little too good, where the other is too bad: the strength was chosen on the same errors.
    luckier = min(ratio, ratio * float(squared[best]) / total)
    interval = [1.0 - ratio * math.exp(reach), 1.0 - luckier * math.exp(-reach)]
    return _Measured(best, errors, 1.0 - ratio, interval)


def _sums(groups: Integers, columns: Doubles, count: int) -> Doubles:
    """Sums (count, k) of columns (n, k) over groups (n,) in 0..count-1."""
    return np.stack([np.bincount(groups, weights=one, minlength=count) for one in columns.T], axis=1)


def _t_95(freedom: int) -> float:
    """The 97.5th percentile of Student's distribution, to 0.002 (Abramowitz and Stegun 26.7.5)."""
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


def _warnings(interval: list[float] | None) -> list[dict[str, str]]:
    if interval is None or interval[0] > 0.0:
        return []
    detail = (
        "These examples do not show that the predictions are better than always answering the mean of the "
        "targets; send more examples, or look at the suspects."
    )
    return [{"code": "no_better_than_mean", "detail": detail}]


def _suspects(errors: Doubles, values: Doubles, scale: float, rows: Integers) -> dict[str, Any]:
    """Rows whose error is out of line with the others', the most first: likely their target is wrong.

    Deviations are from the median, in units of 1.4826 median absolute deviations, or 1.2533 mean ones where
    most errors are alike (Iglewicz and Hoaglin 1993). Of few examples that unit is uncertain, and more is asked.
    """
    apart = np.abs(errors[rows] - np.median(errors[rows]))
    unit = 1.4826 * float(np.median(apart))
    if unit < _ALIKE * float(np.sqrt(np.mean(apart**2))):
        unit = 1.2533 * float(apart.mean())
    # Errors of single precision are nobody's mistake.
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
