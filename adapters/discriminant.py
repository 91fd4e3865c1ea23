"""Linear discriminant analysis with a shrunk covariance: the other linear classifier, in closed form.

Where its assumption of one covariance for all labels holds it needs fewer examples than logistic
regression (Efron 1975). What is held out decides how much it counts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Discriminant:
    """Sums from which the discriminant of all rows but any fold's follows.

    rows: (n, p). labels: (n,) in 0..count-1, each there. folds: (n,), negative for rows in no fold. dim: of
    the space whose coordinates the rows are; over all of it the covariance is shrunk to a multiple of the
    identity.
    """

    def __init__(
        self, rows: Floats, labels: NDArray[np.int64], count: int, folds: NDArray[np.int64], dim: int
    ) -> None:
        self._rows = rows
        self._labels = labels
        self._folds = folds
        self._dim = dim
        self._sizes = np.bincount(labels, minlength=count)
        self._sums = _label_sums(rows, labels, count)
        self._moments = rows.T @ rows
        # The fewer examples for the columns, the rounder the covariance. Near the best of a grid on ten sets.
        self._shrinkage = 1.0 / (1.0 + 2.0 * (len(rows) / dim) ** 1.5)

    def held_out(self, fold: int) -> Floats:
        """Logits (labels, m) of the fold's rows, ascending, from what the others say."""
        own = np.flatnonzero(self._folds == fold)
        rows = self._rows[own]
        sums = self._sums - _label_sums(rows, self._labels[own], len(self._sizes))
        sizes = self._sizes - np.bincount(self._labels[own], minlength=len(self._sizes))
        weight, bias = self._solved(self._moments - rows.T @ rows, sums, sizes)
        logits: Floats = weight @ rows.T + bias[:, None]
        return logits

    def weights(self) -> Floats:
        """Weights (labels, p + 1) of all rows, the intercept last."""
        weight, bias = self._solved(self._moments, self._sums, self._sizes)
        return np.concatenate([weight, bias[:, None]], axis=1)

    def _solved(self, moments: Floats, sums: Floats, sizes: NDArray[np.int64]) -> tuple[Floats, Floats]:
        weights = np.maximum(sizes, 1).astype(np.float32)[:, None]
        means = sums / weights
        n = float(sizes.sum())
        covariance = (moments - sums.T @ means) / np.float32(n)
        level = max(float(np.trace(covariance)) / self._dim, 1e-12)
        covariance *= np.float32(1.0 - self._shrinkage)
        covariance[np.diag_indices_from(covariance)] += np.float32(self._shrinkage * level)
        weight = np.ascontiguousarray(np.linalg.solve(covariance, means.T).T)
        # How frequent a label is does not depend on what is held out.
        priors = np.log(self._sizes / self._sizes.sum()).astype(np.float32)
        return weight, priors - np.float32(0.5) * np.einsum("cp,cp->c", weight, means)


def _label_sums(rows: Floats, labels: NDArray[np.int64], count: int) -> Floats:
    sums = np.zeros((count, rows.shape[1]), dtype=np.float32)
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    for begin in range(0, rows.shape[1], 128):
        columns = slice(begin, begin + 128)
        sums[present, columns] = np.add.reduceat(rows[:, columns][order], starts, axis=0)
    return sums
