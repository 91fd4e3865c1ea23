"""The graph of an export in half precision, for GPUs. onnx lives here, and ONNX Runtime's converter."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from models.spec import GRAPH_FILE, HALF_FILE

logger = logging.getLogger("topwork")


def halve(folder: Path) -> None:
    """Writes the graph of an export folder once more, computing in float16 between float32 ends.

    A graph that cannot be converted has none, and runs in single precision.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = onnx.load(folder / GRAPH_FILE)
    try:
        with warnings.catch_warnings():
            # Of numbers too small for half precision, which become the smallest there is.
            warnings.simplefilter("ignore")
            half = convert_float_to_float16(model, keep_io_types=True)
        # The casts that it adds stand at the end, whatever reads them.
        OnnxModel(half).topological_sort()
        onnx.checker.check_model(half)
    except Exception as error:
        logger.warning("%s has no half precision form: %s", folder, error)
        return
    onnx.save(half, folder / HALF_FILE)
