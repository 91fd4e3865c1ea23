"""Leading directions of feature rows, precise enough for a preconditioner and for distances."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from models.arrays import Floats

_SKETCH_ROWS = 2048  # evenly spaced rows used, at most
_FEW_ROWS = 64  # most rows that are decomposed exactly


def leading_directions(features: Floats, count: int) -> tuple[Floats, Floats]:
    """Approximate the `count` largest eigenvalues of features'features, and their vectors (dim, count).

    Few rows are decomposed exactly, more by subspace iteration on evenly spaced rows (Halko, Martinsson,
    Tropp 2011). Deterministic. A preconditioner and a measure of distance need no more precision.
    """
    n, dim = features.shape
    rows = np.ascontiguousarray(features[:: -(-n // _SKETCH_ROWS)])
    count = min(count, dim, len(rows))
    if len(rows) <= _FEW_ROWS:
        values, vectors = np.linalg.eigh(rows @ rows.T)
        largest = vectors[:, ::-1][:, :count]
        directions = rows.T @ largest
        # QR makes the vectors orthonormal even if the rows do not have full rank.
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
    """Random columns, always the same, so that equal rows give equal directions. Cached; do not modify."""
    return np.random.default_rng(0).standard_normal((dim, width), dtype=np.float32)
