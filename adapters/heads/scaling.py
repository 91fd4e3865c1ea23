"""From embeddings to the rows that the solvers work on, and from their weights back to embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.arrays import Floats

Transform = Literal["none", "sqrt"]

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
    for block in blocks(len(embeddings)):
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


def blocks(n: int) -> Iterator[slice]:
    """Slices of so many rows, small enough for a core's cache."""
    for begin in range(0, n, _BLOCK_ROWS):
        yield slice(begin, min(n, begin + _BLOCK_ROWS))
