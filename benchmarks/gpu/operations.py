"""A network's cost, read from its exported graph: operations, and values that a chip must move.

Shapes are those of a run on the CPU, so graphs of any exporter can be counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

_PRODUCTS = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one run of a feed.

    operations: of its convolutions and matrix products, a multiplication and an addition each. weights:
    values of the constants that these read. activations: values that these read and write, each once.
    """

    operations: float
    weights: float
    activations: float

    def bytes(self, width: int) -> float:
        """Bytes that must be moved, with values of this size."""
        return width * (self.weights + self.activations)


def cost_of(graph: Path, feed: Mapping[str, np.ndarray[Any, Any]]) -> Cost:
    """Runs the graph on the CPU. Elementwise work is not counted: a runtime fuses most of it."""
    model = onnx.load(graph)
    constants = {one.name: tuple(one.dims) for one in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type in _PRODUCTS]
    names = {name for node in products for name in (node.output[0], *node.input[:2]) if name not in constants}
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    for name in sorted(names - known):
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    shapes = {name: value.shape for name, value in zip(outputs, session.run(None, dict(feed)), strict=True)}
    shapes |= constants | {name: value.shape for name, value in feed.items()}
    operations = weights = activations = 0.0
    for node in products:
        left, right, out = (shapes[name] for name in (*node.input[:2], node.output[0]))
        # Number of products that are summed for one output value.
        inner = np.prod(right[1:]) if node.op_type == "Conv" else left[-1]
        operations += 2.0 * float(np.prod(out)) * float(inner)
        weights += float(np.prod(right)) if node.input[1] in constants else 0.0
        activations += float(np.prod(left)) + float(np.prod(out))
        activations += 0.0 if node.input[1] in constants else float(np.prod(right))
    return Cost(operations, weights, activations)
