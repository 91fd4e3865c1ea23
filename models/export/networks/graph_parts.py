"""Parts that are added to an ONNX graph: the inputs and the output of every export, and a pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from models.spec import IDS, MASK, OUTPUT_NAME, PIXELS

# In front of every name of the original graph, so that none is that of an added part.
_ORIGINAL = "net/"
# Values of the added parts.
_PART = "topwork_"
_TINY = np.float32(1e-12)


class _Parts:
    """Nodes and constants around a graph. The operators used have not changed since the oldest opsets."""

    def __init__(self, model: Any) -> None:
        import onnx

        self.model = onnx.compose.add_prefix(model, _ORIGINAL)
        self._before: list[Any] = []
        self._after: list[Any] = []
        self._count = 0

    def constant(self, value: Any) -> str:
        import onnx

        name = self._name()
        self.model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(
        self, operator: str, *inputs: str, before: bool = False, output: str = "", **attributes: Any
    ) -> str:
        """Add a node that runs after the graph, or before it, and return the name of its output."""
        import onnx

        name = output or self._name()
        node = onnx.helper.make_node(operator, inputs, [name], **attributes)
        (self._before if before else self._after).append(node)
        return name

    def finish(self, inputs: Sequence[tuple[str, int, Sequence[str | int]]]) -> bytes:
        """The model with these inputs, each a name, a type and a shape, and the output of every export."""
        import onnx

        graph = self.model.graph
        nodes = [*self._before, *graph.node, *self._after]
        del graph.node[:], graph.input[:], graph.output[:]
        graph.node.extend(nodes)
        graph.input.extend(onnx.helper.make_tensor_value_info(*one) for one in inputs)
        output = onnx.helper.make_tensor_value_info(OUTPUT_NAME, onnx.TensorProto.FLOAT, ["batch", None])
        graph.output.append(output)
        # Shapes that were noted may be those of another batch.
        del graph.value_info[:]
        # From this version on, constants need not be inputs too.
        self.model.ir_version = max(self.model.ir_version, 4)
        return self.model.SerializeToString()  # type: ignore[no-any-return]

    def _name(self) -> str:
        self._count += 1
        return f"{_PART}{self._count}"


def completed_texts(
    model: Any, inputs: Sequence[str], output: str, pooling: str | None, normalised: bool
) -> bytes:
    """A graph from IDS and MASK to embeddings.

    `pooling`: of the output (batch, tokens, dim), "mean" or "cls"; None if it is (batch, dim) already.
    """
    import onnx

    kinds = {one.name: one.type.tensor_type.elem_type for one in model.graph.input}
    parts = _Parts(model)
    for name in inputs:
        ours = {"input_ids": IDS, "attention_mask": MASK}.get(name)
        # Types of tokens are zeros, in the shape of the ids.
        value = ours or parts.add("Sub", IDS, IDS, before=True)
        parts.add("Cast", value, before=True, output=_ORIGINAL + name, to=kinds[name])
    found = _as_float(parts, _ORIGINAL + output)
    if pooling == "cls":
        found = parts.add("Gather", found, parts.constant(np.int64(0)), axis=1)
    elif pooling == "mean":
        mask = _as_float(parts, MASK)
        row = parts.add("Reshape", mask, parts.constant(np.array([0, 1, -1], np.int64)))
        column = parts.add("Reshape", mask, parts.constant(np.array([0, -1, 1], np.int64)))
        # The mask is 0 or 1, so its product with itself is the number of tokens.
        found = parts.add("Div", parts.add("MatMul", row, found), parts.add("MatMul", row, column))
        found = parts.add("Reshape", found, parts.constant(np.array([0, -1], np.int64)))
    if normalised:
        row = parts.add("Reshape", found, parts.constant(np.array([0, 1, -1], np.int64)))
        column = parts.add("Reshape", found, parts.constant(np.array([0, -1, 1], np.int64)))
        length = parts.add("Sqrt", parts.add("MatMul", row, column))
        length = parts.add("Reshape", length, parts.constant(np.array([0, 1], np.int64)))
        found = parts.add("Div", found, parts.add("Max", length, parts.constant(_TINY)))
    parts.add("Identity", found, output=OUTPUT_NAME)
    text = ["batch", "tokens"]
    return parts.finish([(IDS, onnx.TensorProto.INT64, text), (MASK, onnx.TensorProto.INT64, text)])


def completed_images(model: Any, name: str, output: str, *, is_map: bool) -> bytes:
    """A graph from PIXELS to embeddings. `is_map`: average the output (batch, dim, height, width)."""
    import onnx

    value = next(one for one in model.graph.input if one.name == name)
    shape: list[Any] = [one.dim_value or one.dim_param or None for one in value.type.tensor_type.shape.dim]
    parts = _Parts(model)
    parts.add("Cast", PIXELS, before=True, output=_ORIGINAL + name, to=value.type.tensor_type.elem_type)
    found = _as_float(parts, _ORIGINAL + output)
    if is_map:
        found = parts.add("Flatten", parts.add("GlobalAveragePool", found))
    parts.add("Identity", found, output=OUTPUT_NAME)
    return parts.finish([(PIXELS, onnx.TensorProto.FLOAT, ["batch", *shape[1:]])])


def _as_float(parts: _Parts, value: str) -> str:
    import onnx

    return parts.add("Cast", value, to=onnx.TensorProto.FLOAT)
