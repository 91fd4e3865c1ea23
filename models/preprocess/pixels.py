"""Image graphs that take bytes and normalise the pixels themselves.

An image of 224 × 224 pixels is 151 KB in bytes and 602 KB in float32, which must be copied to a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.arrays import Floats
from models.protobuf import (
    FLOAT,
    GRAPH_INPUT,
    MODEL_GRAPH,
    UINT8,
    InvalidGraph,
    constant,
    fields,
    graph_of,
    message,
    name_of,
    node,
    tensor,
)
from models.spec import PIXELS, RGB, ImageTransform

_PREFIX = "topwork_input_"


def scale_and_shift(transform: ImageTransform) -> tuple[Floats, Floats]:
    """The factors to multiply bytes by, and the offsets to subtract then, float32 (3, 1, 1) each."""
    mean, std = (np.array(one, np.float32)[:, None, None] for one in (transform.mean, transform.std))
    return (1 / (255 * std)).astype(np.float32), (mean / std).astype(np.float32)


def normalised(rgb: NDArray[np.uint8], transform: ImageTransform) -> Floats:
    """Normalise bytes (n, size, size, 3) to pixels as in training, float32 (n, 3, size, size).

    The result is bit for bit the same as in the graphs of `with_byte_input`.
    """
    scale, shift = scale_and_shift(transform)
    pixels: Any = rgb.transpose(0, 3, 1, 2).astype(np.float32, order="C")
    pixels *= scale
    pixels -= shift
    return pixels  # type: ignore[no-any-return]


def with_byte_input(model: bytes, transform: ImageTransform) -> bytes:
    """Replace the input PIXELS, float32 (batch, 3, size, size), by RGB, uint8 (batch, size, size, 3).

    A model that already takes bytes is returned unchanged. Raises InvalidGraph.
    """
    graph, rest = graph_of(model)
    kept, inputs = [], []
    for number, whole, content in fields(graph):
        if number == GRAPH_INPUT:
            inputs.append(name_of(content))
        if number != GRAPH_INPUT or inputs[-1] != PIXELS:
            kept.append(whole)
    if RGB in inputs:
        return model
    if PIXELS not in inputs:
        raise InvalidGraph(f"The backbone has no input called {PIXELS!r}; export it again.")
    scale, shift = scale_and_shift(transform)
    turned, floats, scaled = (f"{_PREFIX}{place}" for place in range(3))
    added = [
        # Bytes are transposed rather than floats, because they take a quarter of the memory.
        node("Transpose", (RGB,), turned, perm=(0, 3, 1, 2)),
        node("Cast", (turned,), floats, to=FLOAT),
        node("Mul", (floats, f"{_PREFIX}scale"), scaled),
        node("Sub", (scaled, f"{_PREFIX}shift"), PIXELS),
        constant(f"{_PREFIX}scale", scale),
        constant(f"{_PREFIX}shift", shift),
        tensor(GRAPH_INPUT, RGB, UINT8, "batch", transform.size, transform.size, 3),
    ]
    # Nodes must be listed in the order in which they run, so the new ones go first.
    return b"".join([*rest, message(MODEL_GRAPH, *added, *kept)])
