"""The region of an adapter's training embeddings, and the distance of an input from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.heads.directions import leading_directions
from adapters.heads.scaling import centre_of
from models.arrays import Floats, Integers

BETWEEN = 16  # directions along which label means lie apart, at most
WITHIN = 8  # directions along which the examples of one label spread, at most
_FEWEST = 8  # held-out examples; fewer say too little about usual distances
_QUANTILE = 0.99  # share of held-out distances that are accepted
_DEVIATIONS = 2.326  # standard deviations from the mean to that quantile in a normal distribution
_MANY = 1000  # examples from which a single one no longer affects the directions
# Squared distance below which distances are rounding errors. A higher limit keeps their ratios finite.
_LEAST = 1e-6
# Share of the mean squared row length that keeps a Gram matrix positive definite in single precision.
_JITTER = 1e-3


@dataclass(frozen=True, slots=True)
class NoveltyRegion:
    """Mahalanobis distance to the nearest label's mean, from a few directions and an isotropic rest.

    The distance is that of Lee et al. 2018; low rank plus isotropic keeps it in kilobytes. Embeddings are not
    scaled, because what evens out variances for the weights also hides unfamiliar inputs (AUROC of drawings
    shown to a photo adapter: 0.88, and 0.83 on scaled features).
    """

    mean: Floats  # float32 (dim,), of the embeddings
    directions: NDArray[np.int8]  # (k, dim); a row times its step is a direction over its standard deviation
    steps: Floats  # float32 (k,)
    plain: Floats  # float32 (k,), standard deviations along the directions
    centres: Floats  # float32 (labels or 1, k), label means along the directions
    rest: float  # variance per remaining dimension
    # Mean and standard deviation of the log of held-out examples' squared distances.
    log_mean: float
    log_deviation: float
    limit: float  # largest accepted squared distance, their 99th percentile

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the arrays take."""
        arrays = (self.mean, self.directions, self.steps, self.plain, self.centres)
        return sum(array.nbytes for array in arrays)

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by their names in a head's file."""
        return {
            "region.mean": self.mean.astype(np.float16),
            "region.directions": self.directions,
            "region.steps": self.steps,
            "region.plain": self.plain,
            "region.centres": self.centres,
        }

    @property
    def numbers(self) -> list[float]:
        """The numbers, as `assembled` takes them."""
        return [self.rest, self.log_mean, self.log_deviation, self.limit]

    @classmethod
    def assembled(cls, arrays: Mapping[str, NDArray[Any]], numbers: Sequence[float]) -> NoveltyRegion:
        """Return the region with these arrays and numbers, as read from a file."""
        rest, log_mean, log_deviation, limit = map(float, numbers)
        return cls(
            mean=arrays["region.mean"].astype(np.float32),
            directions=arrays["region.directions"],
            steps=arrays["region.steps"],
            plain=arrays["region.plain"],
            centres=arrays["region.centres"],
            rest=rest,
            log_mean=log_mean,
            log_deviation=log_deviation,
            limit=limit,
        )

    def squared_distance(self, embeddings: Floats) -> Floats:
        """Squared distances, float32 (n,), of embeddings (n, dim)."""
        centred = embeddings - self.mean
        directions = self.directions.astype(np.float32)
        along: Floats = np.matmul(centred, directions.T)
        along *= self.steps
        inside = along * self.plain
        squared: Floats = np.vecdot(centred, centred) - np.vecdot(inside, inside)
        np.maximum(squared, 0.0, out=squared)
        squared /= np.float32(self.rest)
        squared += nearest(along, self.centres)
        return squared

    def surprise(self, squared: Floats) -> Floats:
        """How many standard deviations the log distances lie above the mean of held-out examples."""
        logs = np.log(np.maximum(squared, _LEAST))
        result: Floats = (logs - np.float32(self.log_mean)) / np.float32(self.log_deviation)
        return result


def nearest(along: Floats, centres: Floats) -> Floats:
    """The squared distance of every row (n, k) to the nearest centre (m, k)."""
    products = along @ centres.T
    products *= -2.0
    products += np.vecdot(centres, centres)
    squared: Floats = np.vecdot(along, along)
    squared += np.minimum.reduce(products, axis=1)
    return np.maximum(squared, 0.0, out=squared)


def fit_region(
    embeddings: Floats, labels: Integers, folds: Integers, most_directions: int
) -> NoveltyRegion | None:
    """Fit the region of embeddings (n, dim) with labels 0.. (n,), measured on held-out folds (n,).

    None if too few examples are held out. Means and spreads come from the other folds, and so do directions
    if examples are few, because an example is near to anything that was computed from it.
    """
    held = folds >= 0
    count = int(labels.max()) + 1
    n, dim = embeddings.shape
    if int(held.sum()) < _FEWEST or n - count < _FEWEST // 2:
        return None
    mean = centre_of(embeddings.mean(axis=0, dtype=np.float64))
    # Fewer rows than dimensions fit into n coordinates, with the same distances.
    short = embeddings - mean if n < dim else None
    rows = embeddings if short is None else _coordinates(short)
    middle = mean if short is None else np.zeros(n, dtype=np.float32)
    # Three folds are enough for few examples, where this costs as much as the fit.
    parted = folds if n >= _MANY else np.where(held, folds * 3 // (int(folds.max()) + 1), -1)
    # The smallest training part limits the number of directions.
    within = (n - int(np.bincount(parted[held]).max()) - count) // 4
    most = min(most_directions, n, dim, min(BETWEEN, count - 1) + max(within, 0))
    directions = _directions(rows, labels, count, most)
    energy = np.einsum("ij,ij->i", rows, rows) - (2.0 * (rows @ middle) - middle @ middle)
    parts = []
    for part in range(int(parted.max()) + 1):
        own = parted == part
        there = directions if n >= _MANY else _directions(rows[~own], labels[~own], count, len(directions))
        along = rows @ there.T - there @ middle
        means = _means(along[~own], labels[~own], count)
        parts.append((own, along[own], means, np.maximum(energy[own] - (along[own] ** 2).sum(axis=1), 0.0)))
    spread = (
        sum((((along - means[labels[own]]) ** 2).sum(axis=0) for own, along, means, _ in parts)) / held.sum()
    )
    rest = (
        sum(float(left.sum()) for *_, left in parts) / int(held.sum()) / max(min(n, dim) - len(directions), 1)
    )
    rest = max(rest, 1e-12)
    # No direction is narrower than the rest, even if the few examples suggest it.
    plain = np.sqrt(np.maximum(spread, rest)).astype(np.float32)
    squared = np.concatenate(
        [nearest(along / plain, means / plain) + left / rest for _, along, means, left in parts]
    )
    logs = np.log(np.maximum(squared.astype(np.float64), _LEAST))
    log_mean, deviation = float(logs.mean()), max(float(logs.std()), 0.05)
    # This is np.quantile without the tenth of a millisecond that it takes.
    limit = float(np.interp(_QUANTILE * (len(logs) - 1), np.arange(len(logs)), np.sort(logs)))
    if len(logs) < 200:
        # The 99th percentile of few values is their maximum; the tail of a normal distribution is better.
        limit = max(limit, log_mean + _DEVIATIONS * deviation * (1.0 + 2.0 / len(logs)))
    codes, steps = _quantised(
        directions if short is None else np.linalg.solve(rows.T, directions.T).T @ short
    )
    centres = _means(rows @ directions.T - directions @ middle, labels, count) / plain
    return NoveltyRegion(
        mean=mean,
        directions=codes,
        steps=(steps / plain).astype(np.float32),
        plain=plain,
        centres=centres,
        rest=rest,
        log_mean=log_mean,
        log_deviation=deviation,
        limit=math.exp(limit),
    )


def _coordinates(centred: Floats) -> Floats:
    """Coordinates (n, n) of few rows (n, dim) in an orthonormal basis of their span."""
    gram = centred @ centred.T
    gram[np.diag_indices_from(gram)] += np.float32(_JITTER * np.trace(gram) / len(gram) + 1e-12)
    return np.linalg.cholesky(gram)


def _directions(features: Floats, labels: Integers, count: int, most: int) -> Floats:
    """Orthonormal rows (k, dim): directions in which label means spread, then examples around them."""
    means = _means(features, labels, count)
    between = min(BETWEEN, count - 1, most)
    basis = np.zeros((0, features.shape[1]), dtype=np.float32)
    if between:
        basis = leading_directions(means - means.mean(axis=0), between)[1].T
    within = min(WITHIN if count > 1 else BETWEEN, most - between)
    if within > 0:
        step = -(-len(features) // 2048)
        around = features[::step] - means[labels[::step]]
        around -= (around @ basis.T) @ basis
        basis = np.concatenate([basis, leading_directions(around, within)[1].T])
    # The two parts come from different decompositions; rounding must not count anything twice.
    return np.ascontiguousarray(np.linalg.qr(basis.T)[0].T)


def _quantised(directions: Floats) -> tuple[NDArray[np.int8], Floats]:
    steps = (np.maximum(np.abs(directions).max(axis=1), 1e-12) / 127.0).astype(np.float32)
    codes = np.rint(directions / steps[:, None]).astype(np.int8)
    # The directions regain unit length, so that what lies along them is exactly what the rest lacks.
    steps = (1.0 / np.sqrt((codes.astype(np.float32) ** 2).sum(axis=1))).astype(np.float32)
    return codes, steps


def _means(rows: Floats, labels: Integers, count: int) -> Floats:
    """Mean row of every label, (count, columns); zero for a label without rows."""
    sizes = np.maximum(np.bincount(labels, minlength=count), 1).astype(np.float32)
    means: Floats = label_sums(rows, labels, count) / sizes[:, None]
    return means


def label_sums(rows: Floats, labels: Integers, count: int) -> Floats:
    """The sum (count, columns) of the rows (n, columns) of each label 0..count-1; zero if it has none."""
    sums = np.zeros((count, rows.shape[1]), dtype=np.float32)
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    for begin in range(0, rows.shape[1], 128):
        columns = slice(begin, begin + 128)
        sums[present, columns] = np.add.reduceat(rows[:, columns][order], starts, axis=0)
    return sums
