"""4-bit form of an exported graph's matrices: blocks of 32 weights with a scale each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.arrays import Floats

BLOCK = 32  # weights that share a scale


def quantize_matrices(graph: Path) -> None:
    """Replace products with constant matrices by MatMulNBits. Matrices that have 4 bits already keep them.

    ONNX Runtime then multiplies in 8 bits, with a scale for each block of a token's activations, so no token
    depends on another.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(graph)
    constants = {one.name: one for one in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in constants:
            continue
        matrix = numpy_helper.to_array(constants[node.input[1]])
        if matrix.ndim != 2 or matrix.shape[0] % BLOCK:
            continue
        levels, scales = four_bits(np.ascontiguousarray(matrix.T))
        name = node.input[1]
        packed = levels[..., ::2] | levels[..., 1::2] << 4
        model.graph.initializer.extend(
            [
                numpy_helper.from_array(packed, f"{name}_bits4"),
                numpy_helper.from_array(scales.reshape(-1), f"{name}_scales"),
            ]
        )
        product = helper.make_node(
            "MatMulNBits",
            [node.input[0], f"{name}_bits4", f"{name}_scales"],
            list(node.output),
            domain="com.microsoft",
            K=matrix.shape[0],
            N=matrix.shape[1],
            bits=4,
            block_size=BLOCK,
            accuracy_level=4,  # activations in 8 bits
        )
        node.CopyFrom(product)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    used = {name for node in model.graph.node for name in node.input}
    kept = [one for one in model.graph.initializer if one.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, graph)


def four_bits(rows: Floats) -> tuple[NDArray[np.uint8], Floats]:
    """Levels 0 to 15, (n, blocks, 32), and scales (n, blocks), of float32 rows (n, 32 × blocks).

    A weight is (level − 8) × scale. The largest weight of a block becomes level 0, as in the format Q4_0.
    """
    blocks = rows.reshape(len(rows), -1, BLOCK)
    place = np.abs(blocks).argmax(axis=-1)[..., None]
    largest = np.take_along_axis(blocks, place, axis=-1)
    scales = (largest / -8).astype(np.float16).astype(np.float32)
    steps = np.where(scales == 0, 1, scales)
    levels: Any = np.clip(np.rint(blocks / steps) + 8, 0, 15).astype(np.uint8)
    return levels, scales[..., 0]
