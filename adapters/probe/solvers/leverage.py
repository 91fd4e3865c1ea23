"""Ridge regressions of many strengths on the same rows, and their errors on groups of rows left out.

C is the examples' part of the inverse of the kernel matrix, bordered by the intercept, and M is the strength
times C. The errors on a left-out group G, with the intercept refitted, are M_GG^-1 (M y)_G (Cawley and
Talbot, Pattern Recognition 36, 2003). If there are no more rows than columns, M is a sum of positive terms
over all directions, so nothing cancels for a row that is nearly reproduced; otherwise M is one minus the hat
matrix. Everything is in double precision, because its eigenvectors take no longer than in single precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from models.arrays import Bools, Doubles, Floats, Integers

_BLOCK_ROWS = 2048
_CHEAP_SYSTEMS = 1e9  # multiplications; up to this cost each group is always left out by itself
_LEAST = 1e-12  # lower bound on M's diagonal, which is zero only by rounding


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Eigenvectors of the centred rows, with which all strengths are solved."""

    features: Floats  # float32 (n, dim)
    centre: Doubles  # (dim,), the mean of the features
    moments: Doubles  # (r,), eigenvalues
    directions: Doubles | None  # (dim, r), eigenvectors of the second moments; None unless n > dim
    # (n, r), the centred rows along the directions, or None if too large to keep. Without directions, the
    # eigenvectors of the kernel: all n - 1 that are orthogonal to the constant one.
    coordinates: Doubles | None

    def shrinkage(self, strengths: Doubles) -> Doubles:
        """Return the share of each direction that remains after shrinking, (r, strengths), from 0 to 1."""
        result: Doubles = self.moments[:, None] / (self.moments[:, None] + strengths)
        return result

    def weights(self, targets: Doubles, strengths: Doubles) -> tuple[Doubles, Doubles]:
        """Return weights (dim, strengths) and intercepts (strengths,) for targets (n,)."""
        mean = targets.mean()
        along = self.project((targets - mean)[:, None]) / (self.moments[:, None] + strengths)
        if self.directions is not None:
            weights = self.directions @ along
        else:
            weights = _products(self.features, self.centre, self.expand(along))
        return weights, mean - self.centre @ weights

    def rows(self, which: Integers) -> Doubles:
        """Return the coordinates (m, r) of these rows."""
        if self.coordinates is not None:
            return self.coordinates[which]
        assert self.directions is not None
        rows: Doubles = (self.features[which] - self.centre) @ self.directions
        return rows

    def project(self, columns: Doubles) -> Doubles:
        """Return the transposed coordinates times columns (n, k), as (r, k)."""
        if self.coordinates is not None:
            return self.coordinates.T @ columns
        assert self.directions is not None
        return self.directions.T @ _products(self.features, self.centre, columns)

    def expand(self, coefficients: Doubles) -> Doubles:
        """Return the coordinates times coefficients (r, k), as (n, k)."""
        if self.coordinates is not None:
            return self.coordinates @ coefficients
        assert self.directions is not None
        turned = self.directions @ coefficients
        return np.concatenate(
            [(self.features[block] - self.centre) @ turned for block in _blocks(len(self.features))]
        )


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Errors at all strengths on rows whose group was left out."""

    errors: Doubles  # (n, strengths)
    # (n, strengths); the sum over a group is what the sum of squared errors on sampled rows would gain if
    # that group did not exist.
    changes: Doubles
    variance: Doubles  # (strengths,), of predictions on new rows, for unit noise in the targets
    folds: int  # number of folds left out in turn; 0 if each group was left out by itself


def spectrum_of(features: Floats, memory_bytes: int = 128 << 20) -> Spectrum:
    """Return the spectrum of features, float32 (n, dim), n >= 2. `memory_bytes`: limit for coordinates."""
    n, dim = features.shape
    centre = features.mean(axis=0, dtype=np.float64)
    if n > dim:
        moments = np.zeros((dim, dim))
        for block in _blocks(n):
            rows = features[block] - centre
            moments += rows.T @ rows
        values, directions = _eigen(moments)
        bare = Spectrum(features, centre, values, directions, None)
        kept = n * dim * 8 <= memory_bytes
        return replace(bare, coordinates=bare.rows(np.arange(n))) if kept else bare
    rows = features - centre
    kernel = rows @ rows.T
    # The constant vector has the eigenvalue zero, as others may; a negative eigenvalue makes it the first.
    kernel -= (np.trace(kernel) + 1.0) / n
    values, vectors = _eigen(kernel)
    return Spectrum(features, centre, values[1:], None, np.ascontiguousarray(vectors[:, 1:]))


def left_out(
    spectrum: Spectrum,
    targets: Doubles,
    strengths: Doubles,
    groups: Integers,
    sampled: Bools,
    folds: Integers,
) -> LeftOut:
    """Return the errors on every row of targets (n,) as if its group had not been there.

    `groups`: (n,). `sampled`: (n,), the rows whose errors count in `changes` and `variance`. `folds`: (n,),
    made of whole groups; they are left out instead of groups that are so large that solving for each would
    cost more than the rest.
    """
    n, dim = spectrum.features.shape
    sizes = np.bincount(groups).astype(np.float64)
    sizes = sizes[sizes > 1]
    columns = min(n, dim)
    blocks = len(strengths) * float((sizes**2 * (2.0 * columns + 4.0 * sizes)).sum())
    if blocks > max(_CHEAP_SYSTEMS, 4.0 * n * dim * columns):
        return _folds_left_out(spectrum, targets, strengths, sampled, folds)
    return _groups_left_out(spectrum, targets, strengths, groups, sampled)


def _groups_left_out(
    spectrum: Spectrum, targets: Doubles, strengths: Doubles, groups: Integers, sampled: Bools
) -> LeftOut:
    n = len(targets)
    plain = 0.0 if spectrum.directions is None else 1.0
    kept = spectrum.shrinkage(strengths)
    # M and its square are `plain` times the centring matrix, plus these factors along the coordinates.
    if spectrum.directions is not None:
        inverse = 1.0 / (spectrum.moments[:, None] + strengths)
        first, second = -inverse, inverse * (kept - 2.0)
    else:
        first = 1.0 - kept
        second = first**2
    centred = targets - targets.mean()
    residuals = plain * centred[:, None] + spectrum.expand(first * spectrum.project(centred[:, None]))
    errors, pulls, variances = (np.empty((n, len(strengths))) for _ in range(3))
    for which, sizes in _chunks(groups):
        rows = spectrum.rows(which)
        own = plain * (1.0 - 1.0 / n)
        squares = rows**2
        room = np.maximum(own + squares @ first, _LEAST)
        error = residuals[which] / room
        pull, variance = error * sampled[which, None] / room, (own + squares @ second) / room**2
        for size in np.unique(sizes[sizes > 1]):
            starts = (np.cumsum(sizes) - sizes)[sizes == size]
            members = starts[:, None] + np.arange(size)
            several, left = rows[members], residuals[which[members]]
            centring = plain * (np.eye(size) - 1.0 / n)
            counted = sampled[which[members]]
            for place in range(len(strengths)):
                turned = np.swapaxes(several, 1, 2)
                inverses = np.linalg.inv(centring + several * first[:, place] @ turned)
                found = (inverses @ left[:, :, place, None])[:, :, 0]
                error[members, place] = found
                pull[members, place] = (inverses @ (found * counted)[:, :, None])[:, :, 0]
                product = inverses @ (centring + several * second[:, place] @ turned)
                variance[members, place] = (product * inverses).sum(axis=2)
        errors[which], pulls[which], variances[which] = error, pull, variance
    variances -= 1.0
    counted = sampled[:, None] * errors
    pulled = plain * (pulls - pulls.mean(axis=0)) + spectrum.expand(first * spectrum.project(pulls))
    squared = counted**2
    # The changes are correct to second order in the entries of M that join two groups.
    changes = squared - 2.0 * errors * pulled + (errors**2 + 2.0 * squared.sum(axis=0) / n) * variances
    return LeftOut(errors, changes, variances[sampled].mean(axis=0) if sampled.any() else np.zeros(1), 0)


def _folds_left_out(
    spectrum: Spectrum, targets: Doubles, strengths: Doubles, sampled: Bools, folds: Integers
) -> LeftOut:
    features = spectrum.features
    n = len(features)
    errors = np.empty((n, len(strengths)))
    axes = spectrum.directions
    whole = None if axes is None else axes * spectrum.moments @ axes.T
    count = int(folds.max()) + 1
    for fold in range(count):
        out, rest = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        if axes is None or whole is None:
            weights, biases = spectrum_of(features[rest]).weights(targets[rest], strengths)
        else:
            weights, biases = _without(spectrum, axes, whole, targets, strengths, out)
        for block in _blocks(len(out)):
            some = out[block]
            errors[some] = targets[some, None] - (features[some] @ weights + biases)
    variance = (1.0 + (spectrum.shrinkage(strengths) ** 2).sum(axis=0)) / n
    return LeftOut(errors, -(errors**2) * sampled[:, None], variance, count)


def _without(
    spectrum: Spectrum,
    axes: Doubles,
    whole: Doubles,
    targets: Doubles,
    strengths: Doubles,
    out: Integers,
) -> tuple[Doubles, Doubles]:
    """Return weights and intercepts fitted without the rows `out`.

    `axes`: directions of all rows. `whole`: second moments of all rows.
    """
    left = len(targets) - len(out)
    mean = targets.mean()
    products = axes @ spectrum.project((targets - mean)[:, None])[:, 0]
    moments = whole.copy()
    total = np.zeros(len(whole))
    for block in _blocks(len(out)):
        some = out[block]
        rows = spectrum.features[some] - spectrum.centre
        moments -= rows.T @ rows
        products -= rows.T @ (targets[some] - mean)
        total += rows.sum(axis=0)
    # The remaining rows have another mean.
    shift, lower = -total / left, -float((targets[out] - mean).sum()) / left
    moments -= left * np.outer(shift, shift)
    products -= left * lower * shift
    values, vectors = _eigen(moments)
    weights = vectors @ ((vectors.T @ products)[:, None] / (values[:, None] + strengths))
    return weights, mean + lower - (spectrum.centre + shift) @ weights


def _eigen(moments: Doubles) -> tuple[Doubles, Doubles]:
    values, vectors = np.linalg.eigh(moments)
    return np.maximum(values, 0.0), vectors


def _products(features: Floats, centre: Doubles, columns: Doubles) -> Doubles:
    """Return the transposed centred features times columns (n, k), as (dim, k)."""
    total = np.zeros((features.shape[1], columns.shape[1]))
    for block in _blocks(len(features)):
        total += (features[block] - centre).T @ columns[block]
    return total


def _chunks(groups: Integers) -> Iterator[tuple[Integers, Integers]]:
    """Yield the rows of whole groups, group by group, and the groups' sizes, about 2,048 rows at a time."""
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups)
    sizes = sizes[sizes > 0]
    ends = np.cumsum(sizes)
    begin = 0
    while begin < len(sizes):
        start = int(ends[begin] - sizes[begin])
        end = max(begin + 1, int(np.searchsorted(ends, start + _BLOCK_ROWS, side="right")))
        yield order[start : ends[end - 1]], sizes[begin:end]
        begin = end


def _blocks(n: int) -> Iterator[slice]:
    for begin in range(0, n, _BLOCK_ROWS):
        yield slice(begin, min(n, begin + _BLOCK_ROWS))
