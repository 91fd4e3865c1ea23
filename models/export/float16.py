"""Conversion of an export's graph to half precision, for GPUs, by onnx and ONNX Runtime's converter."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from models.spec import GRAPH_FILE, HALF_FILE

logger = logging.getLogger("topwork")


def halve(folder: Path) -> None:
    """Write a second graph to an export folder that computes in float16, with float32 inputs and outputs.

    If the graph cannot be converted, none is written, and the backbone runs in single precision.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = onnx.load(folder / GRAPH_FILE)
    try:
        with warnings.catch_warnings():
            # The warnings are about values too small for half precision, which become the smallest one.
            warnings.simplefilter("ignore")
            half = convert_float_to_float16(model, keep_io_types=True)
        # The converter appends casts at the end of the graph, behind the nodes that read them.
        OnnxModel(half).topological_sort()
        onnx.checker.check_model(half)
    except Exception as error:
        logger.warning("%s has no half precision form: %s", folder, error)
        return
    onnx.save(half, folder / HALF_FILE)
