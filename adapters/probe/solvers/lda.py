"""Linear discriminant analysis with a shrunk covariance, in closed form: the second linear classifier.

If all labels share one covariance, as it assumes, it needs fewer examples than logistic regression
(Efron 1975). Held-out examples decide how much it counts.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from adapters.heads.novelty import label_sums
from models.arrays import Doubles, Floats, Integers

_PROBES = 8  # random vectors per estimate of a trace
# Largest number of second moments that are solved together, over all their folds.
_MOST_SUMS = 1 << 22


class Discriminant:
    """The sums from which the discriminant without any one fold follows.

    `rows`: (n, p). `labels`: (n,), in 0..count-1, each present. `folds`: (n,), negative for rows in no fold.
    `dim`: dimension of the space whose coordinates the rows are; over all of it the covariance is shrunk to a
    multiple of the identity.
    """

    def __init__(self, rows: Floats, labels: Integers, count: int, folds: Integers, dim: int) -> None:
        self._rows = rows
        self._labels = labels
        self._folds = folds
        self._dim = dim
        self._sizes = np.bincount(labels, minlength=count)
        self._sums = label_sums(rows, labels, count)
        self._moments = rows.T @ rows
        diagonal = np.diagonal(self._moments)
        apart = self._moments - np.diag(diagonal)
        # Moments are diagonal in a basis of eigenvectors; a small fold is then solved as a low-rank update.
        self._eigenvalues = diagonal if np.abs(apart).max() <= 1e-4 * diagonal.max() else None
        # Fewer examples per dimension need more shrinkage; this is near the best of a grid on ten sets.
        self._shrinkage = 1.0 / (1.0 + 2.0 * (len(rows) / dim) ** 1.5)

    def held_out(self, folds: range) -> Floats:
        """Return logits (labels, m) of the folds' rows, ascending, each predicted without its own fold."""
        rows = np.flatnonzero((self._folds >= folds.start) & (self._folds < folds.stop))
        count = len(self._sizes)
        logits = np.empty((count, len(rows)), dtype=np.float32)
        together = max(1, _MOST_SUMS // self._moments.size)
        for begin in range(folds.start, folds.stop, together):
            end = min(begin + together, folds.stop)
            owns = [np.flatnonzero(self._folds == fold) for fold in range(begin, end)]
            held = np.concatenate(owns)
            pairs = (self._folds[held] - begin) * count + self._labels[held]
            sums = label_sums(self._rows[held], pairs, len(owns) * count).reshape(len(owns), count, -1)
            sizes = np.bincount(pairs, minlength=len(owns) * count).reshape(len(owns), count)
            weight, bias = self._without(owns, self._sums - sums, self._sizes - sizes)
            for place, own in enumerate(owns):
                logits[:, np.searchsorted(rows, own)] = (
                    weight[place] @ self._rows[own].T + bias[place][:, None]
                )
        return logits

    def weights(self) -> Floats:
        """Return weights (labels, p + 1) fitted on all rows, the intercept last."""
        weight, bias = self._solved(self._moments[None].copy(), self._sums[None], self._sizes[None])
        return np.concatenate([weight[0], bias[0][:, None]], axis=1)

    def _without(self, owns: list[Integers], sums: Floats, sizes: Integers) -> tuple[Floats, Floats]:
        """Return weights and biases as `_solved` does, for the rows outside each fold."""
        largest = max(len(own) for own in owns)
        if self._eigenvalues is not None and 2 * (largest + sums.shape[1]) <= sums.shape[2]:
            return self._updated(self._eigenvalues, owns, largest, sums, sizes)
        moments = np.stack([self._moments - self._rows[own].T @ self._rows[own] for own in owns])
        return self._solved(moments, sums, sizes)

    def _updated(
        self,
        eigenvalues: Floats,
        owns: list[Integers],
        largest: int,
        sums: Floats,
        sizes: Integers,
    ) -> tuple[Floats, Floats]:
        """Return the same by Woodbury's identity: a diagonal less outer products of a few rows and means."""
        roots = np.sqrt(np.maximum(sizes, 1)).astype(np.float32)[:, :, None]
        taken = np.zeros((len(owns), largest + sums.shape[1], sums.shape[2]), dtype=np.float32)
        for place, own in enumerate(owns):
            taken[place, : len(own)] = self._rows[own]
        taken[:, largest:] = sums / roots
        left = eigenvalues.sum(dtype=np.float64) - np.einsum("krp,krp->k", taken, taken, dtype=np.float64)
        examples = sizes.sum(axis=1)
        levels = np.maximum(left / (examples * self._dim), 1e-12)
        share = ((1.0 - self._shrinkage) / examples).astype(np.float32)[:, None, None]
        base = share[:, 0] * eigenvalues + (self._shrinkage * levels).astype(np.float32)[:, None]
        scaled = taken / base[:, None, :]
        inner = scaled @ (-share * taken).transpose(0, 2, 1)
        diagonal = np.arange(inner.shape[1])
        inner[:, diagonal, diagonal] += 1.0
        inverse = np.linalg.inv(inner)
        # The means are among the vectors taken away, so only their rows of the inverse remain.
        weight: Floats = inverse[:, largest:] @ scaled
        weight /= roots
        traces = (1.0 / base).sum(axis=1, dtype=np.float64) + share[:, 0, 0] * np.einsum(
            "krs,ksp,krp->k", inverse, scaled, scaled, optimize=True
        )
        noise = self._noise(self._shrinkage * levels * traces, examples)
        return weight, _biases(weight, sums / (roots * roots), noise[:, None] / np.maximum(sizes, 1))

    def _solved(self, moments: Floats, sums: Floats, sizes: Integers) -> tuple[Floats, Floats]:
        """Return weights (k, labels, p) and biases (k, labels) of k problems; overwrites `moments`."""
        means = sums / np.maximum(sizes, 1).astype(np.float32)[:, :, None]
        moments -= sums.transpose(0, 2, 1) @ means
        moments *= (1.0 / sizes.sum(axis=1)).astype(np.float32)[:, None, None]
        levels = np.maximum(np.trace(moments, axis1=1, axis2=2) / self._dim, 1e-12)
        moments *= np.float32(1.0 - self._shrinkage)
        diagonal = np.arange(moments.shape[1])
        moments[:, diagonal, diagonal] += (self._shrinkage * levels).astype(np.float32)[:, None]
        probes = _probes(moments.shape[1])
        asked = np.concatenate(
            [means.transpose(0, 2, 1), np.broadcast_to(probes, (len(means), *probes.shape))], 2
        )
        solved = np.linalg.solve(moments, asked)
        weight: Floats = np.ascontiguousarray(solved[:, :, : means.shape[1]].transpose(0, 2, 1))
        # Hutchinson's estimate (1990) of the trace of the inverse.
        traces = np.einsum("kpm,pm->k", solved[:, :, means.shape[1] :], probes) / probes.shape[1]
        noise = self._noise(self._shrinkage * levels * traces, sizes.sum(axis=1))
        return weight, _biases(weight, means, noise[:, None] / np.maximum(sizes, 1))

    def _noise(self, shrunk: Doubles, examples: Integers) -> Doubles:
        """Return the squared length (k,) that noise adds to the mean of a label with one example.

        It is the trace of the inverse shrunk covariance times the covariance. `shrunk`: (k,), the trace of
        that inverse times the multiple of the identity in the shrunk covariance.
        """
        columns, labels = self._sums.shape[1], len(self._sizes)
        free = examples / np.maximum(examples - labels, 1)
        noise: Doubles = free * np.maximum(columns - shrunk, 0.0) / (1.0 - self._shrinkage)
        return noise


@lru_cache(maxsize=8)
def _probes(columns: int) -> Floats:
    """Return random signs (columns, _PROBES), always the same. The array is cached: do not write to it."""
    signs = np.random.default_rng(0).integers(0, 2, (columns, _PROBES))
    return (2.0 * signs - 1.0).astype(np.float32)


def _biases(weight: Floats, means: Floats, noise: Doubles) -> Floats:
    """Return the biases of equally frequent labels: minus half of each mean's squared length, less noise."""
    lengths = np.einsum("kcp,kcp->kc", weight, means)
    biases: Floats = np.float32(-0.5) * (lengths - noise.astype(np.float32))
    return biases
