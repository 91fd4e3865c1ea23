"""Where an adapter's training embeddings lie, and how far an input is from there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapters.heads.directions import leading_directions
from adapters.heads.scaling import centre_of
from models.arrays import Floats

# Directions along which labels lie apart, and along which the examples of one label spread.
BETWEEN = 16
WITHIN = 8
# Fewer held-out examples say too little about how far is far.
_FEWEST = 8
_QUANTILE = 0.99
_DEVIATIONS = 2.326
# From here on one example leaves no mark on the directions.
_MANY = 1000
# Of the mean squared length of few rows: keeps their Gram matrix positive definite in single precision.
_JITTER = 1e-3


@dataclass(frozen=True, slots=True)
class NoveltyRegion:
    """Mahalanobis distance to the nearest label's mean: a few directions and an isotropic rest.

    Of the embeddings as they are: what evens out their variances for the weights also hides strangers (AUROC
    of drawings shown to a photo adapter 0.88, and 0.83 of the scaled features).

    mean: float32 (dim,), of the embeddings. directions: int8 (k, dim), one row times its steps entry is a
    direction over its standard deviation. centres: float32 (labels or 1, k), label means along them. rest:
    variance per remaining dimension. plain: standard deviations along the directions, float32 (k,).
    log_mean, log_deviation: of the log of squared distances of examples held out. limit: the squared
    distance accepted, their 99th percentile.
    (Lee et al. 2018 has the distance; low rank plus isotropic keeps it in kilobytes.)
    """

    mean: Floats
    directions: NDArray[np.int8]
    steps: Floats
    plain: Floats
    centres: Floats
    rest: float
    log_mean: float
    log_deviation: float
    limit: float

    def squared_distance(self, embeddings: Floats) -> Floats:
        """Squared distances, float32 (n,), of embeddings (n, dim)."""
        centred = embeddings - self.mean
        directions = self.directions.astype(np.float32)
        along: Floats = np.matmul(centred, directions.T) * self.steps
        inside = (along * self.plain) ** 2
        rest = np.maximum(np.einsum("ij,ij->i", centred, centred) - inside.sum(axis=1), 0.0)
        squared: Floats = nearest(along, self.centres) + rest / np.float32(self.rest)
        return squared

    def squared_distance_of(self, embedding: Floats) -> float:
        """The squared distance of one embedding, (dim,), in few calls: see answering.single."""
        centred = embedding - self.mean
        along = np.matmul(self.directions.astype(np.float32), centred) * self.steps
        inside = along * self.plain
        apart = self.centres - along
        to_centres = min(np.einsum("ij,ij->i", apart, apart).tolist())
        rest = max(float(centred @ centred) - float(inside @ inside), 0.0)
        return float(to_centres + rest / self.rest)

    def surprise(self, squared: Floats) -> Floats:
        """How many standard deviations of held-out examples' log distances beyond their mean."""
        logs = np.log(np.maximum(squared, 1e-30))
        result: Floats = (logs - np.float32(self.log_mean)) / np.float32(self.log_deviation)
        return result


def nearest(along: Floats, centres: Floats) -> Floats:
    """The squared distance of every row (n, k) to the nearest centre (m, k)."""
    products = along @ centres.T
    products *= -2.0
    products += np.einsum("ij,ij->i", centres, centres)
    squared = np.einsum("ij,ij->i", along, along) + products.min(axis=1)
    result: Floats = np.maximum(squared, 0.0)
    return result


def fit_region(
    embeddings: Floats, labels: NDArray[np.int64], folds: NDArray[np.int64], most_directions: int
) -> NoveltyRegion | None:
    """The region of embeddings (n, dim) with labels 0.. (n,), measured on examples held out by folds (n,).

    None where too few examples are held out. Means, spreads and, where few examples leave a mark on them,
    directions come from the other folds: an example is near to what was made of it.
    """
    held = folds >= 0
    count = int(labels.max()) + 1
    n, dim = embeddings.shape
    if int(held.sum()) < _FEWEST or n - count < _FEWEST // 2:
        return None
    mean = centre_of(embeddings.mean(axis=0, dtype=np.float64))
    # Few rows have as few coordinates, and the same distances.
    short = embeddings - mean if n < dim else None
    rows = embeddings if short is None else _coordinates(short)
    middle = mean if short is None else np.zeros(n, dtype=np.float32)
    # Thirds do as well for few examples, where this costs as much as the fit.
    parted = folds if n >= _MANY else np.where(held, folds * 3 // (int(folds.max()) + 1), -1)
    # As many directions as the smallest training part can give.
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
    # A direction is not narrower than the rest, however few examples say so.
    plain = np.sqrt(np.maximum(spread, rest)).astype(np.float32)
    squared = np.concatenate(
        [nearest(along / plain, means / plain) + left / rest for _, along, means, left in parts]
    )
    logs = np.log(np.maximum(squared.astype(np.float64), 1e-30))
    log_mean, deviation = float(logs.mean()), max(float(logs.std()), 0.05)
    # np.quantile, without its tenth of a millisecond.
    limit = float(np.interp(_QUANTILE * (len(logs) - 1), np.arange(len(logs)), np.sort(logs)))
    if len(logs) < 200:
        # The 99th percentile of few is their largest: the tail of a normal distribution is the better
        # guess.
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


def _directions(features: Floats, labels: NDArray[np.int64], count: int, most: int) -> Floats:
    """Orthonormal rows (k, dim): where label means spread, then where examples spread around them."""
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
    # The two come from different decompositions; rounding must not count anything twice.
    return np.ascontiguousarray(np.linalg.qr(basis.T)[0].T)


def _quantised(directions: Floats) -> tuple[NDArray[np.int8], Floats]:
    steps = (np.maximum(np.abs(directions).max(axis=1), 1e-12) / 127.0).astype(np.float32)
    codes = np.rint(directions / steps[:, None]).astype(np.int8)
    # Of unit length again, so that what lies along a direction is exactly what the rest lacks.
    steps = (1.0 / np.sqrt((codes.astype(np.float32) ** 2).sum(axis=1))).astype(np.float32)
    return codes, steps


def _means(rows: Floats, labels: NDArray[np.int64], count: int) -> Floats:
    """Mean row of every label, (count, columns); zero for a label without rows."""
    sizes = np.maximum(np.bincount(labels, minlength=count), 1).astype(np.float32)
    means: Floats = _sums(rows, labels, count) / sizes[:, None]
    return means


def _sums(rows: Floats, labels: NDArray[np.int64], count: int) -> Floats:
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels, minlength=count)
    present = np.flatnonzero(sizes)
    starts = np.concatenate([[0], np.cumsum(sizes[present])[:-1]])
    sums = np.zeros((count, rows.shape[1]), dtype=np.float32)
    for begin in range(0, rows.shape[1], 128):
        columns = slice(begin, begin + 128)
        sums[present, columns] = np.add.reduceat(rows[:, columns][order], starts, axis=0)
    return sums
