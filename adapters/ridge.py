"""Fits and measures a head that predicts a number: ridge regression in closed form, all strengths at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.features import basis_of, scaling_of
from adapters.head import Head, directions_for
from adapters.region import fit_region
from adapters.selection import Prepared

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# On rows of mean square length one and a target of unit variance.
_STRENGTHS = 10.0 ** np.arange(-4.0, 4.25, 0.5)
_BLOCK_ROWS = 2048
_RESAMPLES = 500
# Explained variance of fewer examples says nothing.
_FEWEST = 3


def fit_ridge(data: Prepared, values: Doubles) -> tuple[Head, dict[str, Any], Floats]:
    """Head, report and scores (n,) for rows in canonical order; see linear_probe.fit.

    Groups are left out together. Folds are for the distances only. The strength is the one with the lowest
    leave-one-out error, which has a closed form (Golub, Heath, Wahba 1979).
    """
    embeddings, groups = data.embeddings, data.groups
    together = np.zeros(len(embeddings), dtype=np.int64)
    region = fit_region(embeddings, together, data.folds, directions_for(1, embeddings.shape[1]))
    scaling = scaling_of(embeddings)
    features = scaling.apply(embeddings, into=embeddings)
    basis = basis_of(features, full=True)
    mean, scale = float(values.mean()), float(values.std()) or 1.0
    standard = (values - mean) / scale
    rows, moments = basis.design.rows[:, :-1], basis.design.moments[:-1].astype(np.float64)
    projected = rows.T @ standard.astype(np.float32)
    errors = _left_out_errors(rows, moments, projected, standard, groups)
    best = int((errors**2).mean(axis=0).argmin())
    strength = float(_STRENGTHS[best])
    solved = np.append(projected / (moments + strength), 0.0).astype(np.float32)
    weight, bias = basis.weights(solved[None])
    left = errors[:, best] * scale
    measured = len(np.unique(groups)) >= _FEWEST
    head = Head(
        task="regression",
        fingerprint=data.fingerprint,
        labels=(),
        scaling=scaling,
        weight=weight,
        bias=bias,
        region=region,
        value_mean=mean,
        value_scale=scale,
        residual_deviation=float(np.sqrt(np.mean(left**2))) if measured else 0.0,
    )
    report = {
        "r2": _explained(left, values) if measured else None,
        "r2_interval": _r2_interval(left, values) if measured else None,
        "rmse": head.residual_deviation if measured else None,
        "strength": strength,
    }
    scores = -(left**2) if measured else np.full(len(left), np.nan)
    return head, report, scores.astype(np.float32)


def _left_out_errors(
    rows: Floats, moments: Doubles, projected: Floats, standard: Doubles, groups: NDArray[np.int64]
) -> Doubles:
    """Errors (n, strengths) on every row, had its group not been there.

    With residuals r and leverage h of m equal rows together: r + h sum(r) / (1 - m h).
    """
    n = len(rows)
    shrunk = (1.0 / (moments[:, None] + _STRENGTHS)).astype(np.float32)
    coefficients = projected[:, None] * shrunk
    errors = np.empty((n, len(_STRENGTHS)))
    leverage = np.empty_like(errors)
    for begin in range(0, n, _BLOCK_ROWS):
        block = slice(begin, begin + _BLOCK_ROWS)
        errors[block] = standard[block, None] - rows[block] @ coefficients
        leverage[block] = rows[block] ** 2 @ shrunk + 1.0 / n
    sizes = np.bincount(groups)[groups]
    room = np.maximum(1.0 - sizes[:, None] * leverage, 1e-3)
    sums = np.stack([np.bincount(groups, weights=column)[groups] for column in errors.T], axis=1)
    result: Doubles = errors + leverage * sums / room
    return result


def _explained(left: Doubles, values: Doubles) -> float | None:
    spread = float(((values - values.mean()) ** 2).sum())
    return 1.0 - float((left**2).sum()) / spread if spread > 0.0 else None


def _r2_interval(left: Doubles, values: Doubles) -> list[float] | None:
    """95 % of R² over resamples of the examples, seeded."""
    n = len(left)
    generator = np.random.default_rng(0)
    terms = np.stack([np.ones(n), values - values.mean(), (values - values.mean()) ** 2, left**2], axis=1)
    found = []
    for _ in range(_RESAMPLES):
        mass, first, second, error = np.bincount(generator.integers(0, n, n), minlength=n) @ terms
        spread = second - first * first / mass
        if spread > 0.0:
            found.append(1.0 - error / spread)
    return [float(edge) for edge in np.quantile(found, (0.025, 0.975))] if found else None
