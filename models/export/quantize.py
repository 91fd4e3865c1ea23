"""8-bit quantization of exported graphs, by onnx and ONNX Runtime's quantizer.

Every scale is fixed when the graph is made and none depends on the batch, so an input gets the same answer
alone and in a batch. The scales are measured on the data in the folder `calibration`.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.arrays import Floats, Integers, Prepared
from models.feeds import CALIBRATION
from models.preprocess.image import ImagePreprocessor, rgb
from models.preprocess.pixels import normalised
from models.preprocess.text import TextPreprocessor
from models.spec import GRAPH_FILE, IDS, MASK, PIXELS, TOKENIZER_FILE, BackboneSpec, ImageTransform

# Operators to quantize. Pooling is not one: embeddings are float32 means of 8-bit activations.
_IMAGE_OPERATORS = ["Conv", "Add", "Clip", "Relu"]
_LEVELS = 255  # highest 8-bit value
_SHARES = np.linspace(1.0, 0.2, 33)  # candidate fractions of the observed range to keep


def quantize(folder: Path, spec: BackboneSpec) -> None:
    """Replace the graph in an export folder by its 8-bit form. A text's tokenizer must be in the folder."""
    graph = folder / GRAPH_FILE
    if isinstance(spec.transform, ImageTransform):
        _quantize_images(graph, spec.transform)
    else:
        tokenizer = TextPreprocessor(spec.transform, folder / TOKENIZER_FILE)
        texts = (CALIBRATION / "texts.txt").read_text(encoding="utf-8").splitlines()
        _quantize_texts(graph, [tokenizer(text) for text in texts])


def _quantize_images(graph: Path, transform: ImageTransform) -> None:
    """Quantize every convolution, with a scale per output channel of the weights and one per activation."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, feeds: Iterator[Mapping[str, Any]]) -> None:
            self._feeds = feeds

        def get_next(self) -> Mapping[str, Any] | None:
            return next(self._feeds, None)

    with tempfile.TemporaryDirectory(prefix="topwork-quantize-") as name:
        plain, small = Path(name, "plain.onnx"), Path(name, "small.onnx")
        quant_pre_process(graph, plain, skip_symbolic_shape=True)
        quantize_static(
            plain,
            small,
            Reader({PIXELS: normalised(picture[None], transform)} for picture in _pictures(transform)),
            quant_format=QuantFormat.QOperator,
            op_types_to_quantize=_IMAGE_OPERATORS,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        graph.write_bytes(small.read_bytes())


def _pictures(transform: ImageTransform) -> Iterator[Prepared]:
    """Yield preprocessed photographs, uint8 (size, size, 3): whole, small on white, and in quarters."""
    prepare = ImagePreprocessor(transform)
    for path in sorted(CALIBRATION.glob("*.jpg")):
        image = rgb(path.read_bytes())
        width, height = image.size
        on_white = Image.new("RGB", (2 * width, 2 * height), "white")
        on_white.paste(image, (width // 2, height // 2))
        quarters = [
            image.crop((left, top, left + width // 2, top + height // 2))
            for left in (0, width // 2)
            for top in (0, height // 2)
        ]
        for view in (image, on_white, *quarters):
            file = io.BytesIO()
            view.save(file, "PNG")
            yield prepare(file.getvalue())


@dataclass(frozen=True, slots=True)
class _Scale:
    """The 8-bit scale of an activation (n, columns): round(activation / spread / step) + zero."""

    spread: Floats  # divisor of each column, float32 (columns,)
    step: float
    zero: int


def _quantize_texts(graph: Path, texts: Sequence[Integers]) -> None:
    """Quantize every product with a constant matrix; the attention itself keeps single precision.

    Some columns of a transformer's activations are ten times as large as others. Before the columns share a
    scale, each is divided by a part of its size, and its row of the weights is multiplied by it (SmoothQuant,
    Xiao et al. 2022).
    """
    import onnx

    model = onnx.load(graph)
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    products = [
        node
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in constants and constants[node.input[1]].ndim == 2
    ]
    readers: dict[str, list[Any]] = {}
    for node in products:
        readers.setdefault(node.input[0], []).append(node)
    seen = _activations(model, list(readers), texts)
    before: dict[str, list[Any]] = {}
    instead: dict[str, Any] = {}
    for number, (name, nodes) in enumerate(readers.items()):
        weights = [constants[node.input[1]] for node in nodes]
        scale = _scale_of(seen[name], np.concatenate(weights, axis=1))
        as_bytes, before[name] = _to_bytes(model, f"input8_{number}", name, scale)
        for place, (node, weight) in enumerate(zip(nodes, weights, strict=True)):
            new = _product(model, f"weight8_{number}_{place}", as_bytes, scale, weight)
            new.output.append(node.output[0])
            instead[node.output[0]] = new
    nodes = []
    for node in model.graph.node:
        if node.output[0] not in instead:
            nodes.append(node)
            continue
        # The conversion goes right before its first reader, and so after the node that makes its input.
        nodes += [*before.pop(node.input[0], ()), instead[node.output[0]]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    used = {name for node in nodes for name in node.input}
    kept = [one for one in model.graph.initializer if one.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, graph)


def _activations(model: Any, names: Sequence[str], texts: Sequence[Integers]) -> Mapping[str, Floats]:
    """Run the texts and return intermediate values of the graph, float32 (n, columns), a row per token."""
    import onnx
    import onnxruntime

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    for name in names:
        probe.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    rows: dict[str, list[Floats]] = {name: [] for name in names}
    for tokens in texts:
        feed = {IDS: tokens[None], MASK: np.ones((1, len(tokens)), np.int64)}
        for name, value in zip(names, session.run(list(names), feed), strict=True):
            rows[name].append(value.reshape(-1, value.shape[-1]))
    return {name: np.concatenate(found) for name, found in rows.items()}


def _scale_of(rows: Floats, weights: Floats) -> _Scale:
    """Choose the scale of an activation from observed rows (n, columns) and its weights (columns, outputs).

    The kept part of the range minimises the mean squared error: clipping a few outliers gives all other
    values finer steps.
    """
    sizes = np.abs(rows).max(axis=0) + 1e-6
    spread = np.sqrt(sizes / (np.abs(weights).max(axis=1) + 1e-6))
    spread /= np.exp(np.log(spread).mean())
    even = rows / spread
    low, high = min(float(even.min()), 0.0), max(float(even.max()), 0.0)
    best, found = np.inf, _Scale(spread, 1.0, 0)
    for share in _SHARES:
        step = share * (high - low) / _LEVELS
        zero = round(-share * low / step)
        levels = np.clip(np.rint(even / step) + zero, 0, _LEVELS)
        error = float(np.square((levels - zero) * step - even).mean())
        if error < best:
            best, found = error, _Scale(spread.astype(np.float32), step, zero)
    return found


def _to_bytes(model: Any, name: str, value: str, scale: _Scale) -> tuple[str, list[Any]]:
    """The name of a value's 8-bit form, and the nodes that compute it."""
    from onnx import helper

    _constant(model, f"{name}_spread", 1.0 / scale.spread)
    _constant(model, f"{name}_step", np.float32(scale.step))
    _constant(model, f"{name}_zero", np.uint8(scale.zero))
    return name, [
        helper.make_node("Mul", [value, f"{name}_spread"], [f"{name}_even"]),
        helper.make_node("QuantizeLinear", [f"{name}_even", f"{name}_step", f"{name}_zero"], [name]),
    ]


def _product(model: Any, name: str, value: str, scale: _Scale, weight: Floats) -> Any:
    """A node that multiplies by an 8-bit matrix with a scale per column; the caller names its output."""
    from onnx import helper

    weight = weight * scale.spread[:, None]
    steps = np.maximum(np.abs(weight).max(axis=0), 1e-12) / 127.0
    _constant(model, name, np.rint(weight / steps).astype(np.int8))
    _constant(model, f"{name}_steps", steps.astype(np.float32))
    _constant(model, f"{name}_zeros", np.zeros(len(steps), np.int8))
    inputs = [value, name, f"{value}_step", f"{name}_steps", f"{value}_zero", f"{name}_zeros"]
    return helper.make_node("MatMulIntegerToFloat", inputs, [], domain="com.microsoft")


def _constant(model: Any, name: str, value: Any) -> None:
    from onnx import numpy_helper

    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
