"""The basis in which the solvers work, and the map from their weights back to features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adapters.heads.directions import leading_directions
from adapters.heads.scaling import blocks
from adapters.probe.solvers.logistic import Design
from models.arrays import Floats

# Largest number of rows or columns for which a full eigenbasis costs less than the products it saves.
_FULL_BASIS = 512
_LEADING = 64  # eigenvectors kept for the preconditioner of a larger basis


@dataclass(frozen=True, slots=True)
class Basis:
    """A design, and the map from weights on its columns to weights on features."""

    design: Design
    lift: Floats | None  # orthonormal rows (columns without intercept, dim); None if the columns are features

    def weights(self, solved: Floats) -> tuple[Floats, Floats]:
        """Return weights (labels, dim) and intercepts (labels,) for `solved` weights (labels, columns)."""
        own = np.ascontiguousarray(solved[:, :-1])
        return (own if self.lift is None else own @ self.lift), solved[:, -1].copy()


def basis_of(features: Floats, columns: int | None = None) -> Basis:
    """Return the cheapest basis for features (n, dim).

    Few rows are expressed in their span, few columns in an eigenbasis; larger features stay as they are.
    `columns`: number of leading directions to keep; None keeps all.
    """
    n, dim = features.shape
    if columns is not None and columns < min(n, dim):
        leading, directions = leading_directions(features, columns)
        return _along(features, leading, directions)
    if n <= dim and n <= _FULL_BASIS:
        return _span(features)
    if dim <= _FULL_BASIS:
        return _rotated(features)
    leading, directions = leading_directions(features, _LEADING)
    rows = _with_ones(features)
    total = float(np.einsum("ij,ij->", features, features, dtype=np.float64))
    rest = max(total - float(leading.sum()), 0.0) / (dim - len(leading))
    moments = np.full(dim + 1, rest, dtype=np.float32)
    moments[-1] = n
    padded = np.concatenate([directions, np.zeros((1, len(leading)), np.float32)])
    return Basis(Design(rows, moments, padded, leading), None)


def _span(features: Floats) -> Basis:
    """Return the coordinates of few rows in their span, along the eigenvectors of the Gram matrix."""
    values, vectors = np.linalg.eigh(features @ features.T)
    kept = values > 1e-6 * max(float(values[-1]), 1e-30)
    if not kept.any():
        # All rows are zero, and so are their coordinates along any direction.
        return _along(features, np.zeros(1, np.float32), np.eye(features.shape[1], 1, dtype=np.float32))
    values, vectors = values[kept], vectors[:, kept]
    roots = np.sqrt(values)
    lift = (vectors / roots).T @ features
    return Basis(Design(_with_ones(vectors * roots), np.append(values, np.float32(len(features)))), lift)


def _rotated(features: Floats) -> Basis:
    """Return the coordinates of few columns along the eigenvectors of the second moments."""
    values, vectors = np.linalg.eigh(features.T @ features)
    return _along(features, np.maximum(values, 0.0), vectors)


def _along(features: Floats, values: Floats, vectors: Floats) -> Basis:
    rows = np.empty((len(features), len(values) + 1), dtype=np.float32)
    rows[:, -1] = 1.0
    for block in blocks(len(features)):
        rows[block, :-1] = features[block] @ vectors
    return Basis(Design(rows, np.append(values, np.float32(len(features)))), np.ascontiguousarray(vectors.T))


def _with_ones(features: Floats) -> Floats:
    rows = np.empty((features.shape[0], features.shape[1] + 1), dtype=np.float32)
    rows[:, :-1] = features
    rows[:, -1] = 1.0
    return rows
