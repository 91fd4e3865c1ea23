"""Scaling of embeddings to the feature rows that the solvers work on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from models.arrays import Doubles, Floats

Transform = Literal["none", "sqrt"]

_BLOCK_ROWS = 1024  # few enough for a core's cache


@dataclass(frozen=True, slots=True)
class Scaling:
    """Maps embeddings to features: transform, subtract the mean, divide by the scale.

    "sqrt" evens out the variances of non-negative activations, whose spread grows with their mean (measured:
    1.5 to 2.5 points on EfficientNet embeddings). Columns are not scaled one by one: that would amplify those
    that hardly vary.
    """

    transform: Transform
    mean: Floats  # float32 (dim,)
    # Root mean square length of the centred rows. It makes one strength of regularisation mean the same for
    # every backbone.
    scale: float

    def apply(self, embeddings: Floats, into: Floats | None = None) -> Floats:
        """Features, float32 (n, dim). `into`: output array, which may be the embeddings themselves."""
        if self.transform == "sqrt":
            features = np.maximum(embeddings, 0.0, out=into)
            np.sqrt(features, out=features)
            features -= self.mean
        else:
            features = np.subtract(embeddings, self.mean, out=into)
        features *= np.float32(1.0 / self.scale)
        return features


def scaling_of(embeddings: Floats) -> Scaling:
    """The scaling for training embeddings, which are finite float32 (n, dim)."""
    transform: Transform = "sqrt" if embeddings.min() >= 0.0 else "none"
    total = np.zeros(embeddings.shape[1])
    squares = 0.0
    for block in blocks(len(embeddings)):
        rows = np.sqrt(embeddings[block]) if transform == "sqrt" else embeddings[block]
        total += rows.sum(axis=0, dtype=np.float64)
        squares += float(np.einsum("ij,ij->", rows, rows, dtype=np.float64))
    mean = total / len(embeddings)
    spread = squares / len(embeddings) - float(mean @ mean)
    # Identical rows have a small spread from rounding, and nothing can be learned from them.
    scale = spread**0.5 if spread > 1e-9 * squares / len(embeddings) else 1.0
    return Scaling(transform, centre_of(mean), scale)


def centre_of(mean: Doubles) -> Floats:
    """The mean as a head stores it, in half precision, so that the same centre is used everywhere."""
    half = np.finfo(np.float16)
    return np.clip(mean, half.min, half.max).astype(np.float16).astype(np.float32)


def blocks(n: int) -> Iterator[slice]:
    """Yield slices of at most _BLOCK_ROWS rows."""
    for begin in range(0, n, _BLOCK_ROWS):
        yield slice(begin, min(n, begin + _BLOCK_ROWS))
