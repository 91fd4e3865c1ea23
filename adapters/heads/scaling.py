"""From embeddings to the rows that the solvers work on, and from their weights back to embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from adapters.probe.logistic import Design

Floats = NDArray[np.float32]
Transform = Literal["none", "sqrt"]

# Up to this many columns a full eigenbasis costs less than the products that it saves.
_FULL_BASIS = 512
_LEADING = 64
_SKETCH_ROWS = 2048
_FEW_ROWS = 64
_BLOCK_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Scaling:
    """What is done to embeddings before they meet weights: transform, minus mean, over scale.

    mean: float32 (dim,). scale: the root mean square length of the centred rows, so that one strength of
    regularisation means the same for every backbone. "sqrt" evens out the variances of non-negative
    activations, whose spread grows with their mean (measured: 1.5 to 2.5 points on EfficientNet
    embeddings); no per-column scaling: it amplifies columns that hardly vary.
    """

    transform: Transform
    mean: Floats
    scale: float

    def apply(self, embeddings: Floats, into: Floats | None = None) -> Floats:
        """Rows of features, float32 (n, dim); into may be the embeddings themselves."""
        if self.transform == "sqrt":
            features = np.maximum(embeddings, 0.0, out=into)
            np.sqrt(features, out=features)
            features -= self.mean
        else:
            features = np.subtract(embeddings, self.mean, out=into)
        features *= np.float32(1.0 / self.scale)
        return features


def scaling_of(embeddings: Floats) -> Scaling:
    """The scaling for training embeddings, finite float32 (n, dim)."""
    transform: Transform = "sqrt" if embeddings.min() >= 0.0 else "none"
    total = np.zeros(embeddings.shape[1])
    squares = 0.0
    for block in _blocks(len(embeddings)):
        rows = np.sqrt(embeddings[block]) if transform == "sqrt" else embeddings[block]
        total += rows.sum(axis=0, dtype=np.float64)
        squares += float(np.einsum("ij,ij->", rows, rows, dtype=np.float64))
    mean = total / len(embeddings)
    spread = squares / len(embeddings) - float(mean @ mean)
    # Rounding leaves something of identical rows; nothing is to be learned from them.
    scale = spread**0.5 if spread > 1e-9 * squares / len(embeddings) else 1.0
    return Scaling(transform, centre_of(mean), scale)


def centre_of(mean: NDArray[np.float64]) -> Floats:
    """The mean as a head stores it, in half precision: rows need one centre near it everywhere."""
    half = np.finfo(np.float16)
    return np.clip(mean, half.min, half.max).astype(np.float16).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Basis:
    """A design, and how weights on its columns become weights on features.

    lift: orthonormal (columns without the intercept, dim), or None where the columns are the features.
    """

    design: Design
    lift: Floats | None

    def weights(self, solved: Floats) -> tuple[Floats, Floats]:
        """Weights (labels, dim) and intercepts (labels,) from solved (labels, columns)."""
        own = np.ascontiguousarray(solved[:, :-1])
        return (own if self.lift is None else own @ self.lift), solved[:, -1].copy()


def basis_of(features: Floats, columns: int | None = None) -> Basis:
    """The cheapest basis for features (n, dim): span of few rows, eigenbasis of few columns, else as is.

    columns: how many leading directions to keep; None for all.
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
    """Few rows: coordinates in their span, along the eigenvectors of the Gram matrix."""
    values, vectors = np.linalg.eigh(features @ features.T)
    kept = values > 1e-6 * max(float(values[-1]), 1e-30)
    values, vectors = values[kept], vectors[:, kept]
    roots = np.sqrt(values)
    lift = (vectors / roots).T @ features
    return Basis(Design(_with_ones(vectors * roots), np.append(values, np.float32(len(features)))), lift)


def _rotated(features: Floats) -> Basis:
    """Few columns: coordinates along the eigenvectors of the second moments."""
    values, vectors = np.linalg.eigh(features.T @ features)
    return _along(features, np.maximum(values, 0.0), vectors)


def _along(features: Floats, values: Floats, vectors: Floats) -> Basis:
    rows = np.empty((len(features), len(values) + 1), dtype=np.float32)
    rows[:, -1] = 1.0
    for block in _blocks(len(features)):
        rows[block, :-1] = features[block] @ vectors
    return Basis(Design(rows, np.append(values, np.float32(len(features)))), np.ascontiguousarray(vectors.T))


def leading_directions(features: Floats, count: int) -> tuple[Floats, Floats]:
    """About the count largest eigenvalues of features'features, and their vectors (dim, count).

    Of few rows exactly, else by subspace iteration on evenly spaced rows (Halko, Martinsson, Tropp 2011),
    deterministic. A preconditioner and a measure of distance need no more precision.
    """
    n, dim = features.shape
    rows = np.ascontiguousarray(features[:: -(-n // _SKETCH_ROWS)])
    count = min(count, dim, len(rows))
    if len(rows) <= _FEW_ROWS:
        values, vectors = np.linalg.eigh(rows @ rows.T)
        largest = vectors[:, ::-1][:, :count]
        directions = rows.T @ largest
        # Orthonormal even where rows are fewer than they look.
        return np.maximum(values[::-1][:count], 0.0), np.linalg.qr(directions)[0]
    width = min(count + 8, dim)
    moments = rows.T @ rows if len(rows) * width > dim * dim // 4 else None
    sketch = _sketch(dim, width)
    for _ in range(3):
        sketch, _ = np.linalg.qr(moments @ sketch if moments is not None else rows.T @ (rows @ sketch))
    image = rows @ sketch
    values, vectors = np.linalg.eigh(image.T @ image)
    leading = np.maximum(values[::-1][:count], 0.0) * np.float32(n / len(rows))
    return leading, sketch @ vectors[:, ::-1][:, :count]


@lru_cache(maxsize=8)
def _sketch(dim: int, width: int) -> Floats:
    """Random columns, the same ones always: equal rows give equal directions. Not to be written to."""
    return np.random.default_rng(0).standard_normal((dim, width), dtype=np.float32)


def _with_ones(features: Floats) -> Floats:
    rows = np.empty((features.shape[0], features.shape[1] + 1), dtype=np.float32)
    rows[:, :-1] = features
    rows[:, -1] = 1.0
    return rows


def _blocks(n: int) -> Iterator[slice]:
    for begin in range(0, n, _BLOCK_ROWS):
        yield slice(begin, min(n, begin + _BLOCK_ROWS))
