"""Small ONNX networks as other programs export them, with the files that describe them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.arrays import Floats
from tests.support.models.tiny_backbones import word_tokenizer

DIM = 24
SIZE = 32
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TIMM_CONFIG = {
    "architecture": "tiny",
    "pretrained_cfg": {
        "input_size": [3, SIZE, SIZE],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "crop_mode": "center",
    },
}


def word_table(seed: int = 2) -> Floats:
    """The embeddings of the words of `text_graph`, float32 (words, DIM)."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((word_tokenizer().get_vocab_size(), DIM)).astype(np.float32)


def text_graph(
    path: Path,
    *,
    inputs: Sequence[str] = TEXT_INPUTS,
    outputs: Sequence[str] = ("last_hidden_state",),
    kind: int = TensorProto.INT64,
    batch: int | str = "batch",
    external: str | None = None,
    opset: int = 11,
    seed: int = 2,
) -> Path:
    """Write a network whose token embeddings are rows of a table; further outputs are their mean."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["found"]),
        helper.make_node("Identity", ["found"], [outputs[0]]),
        *(helper.make_node("ReduceMean", ["found"], [one], axes=[1], keepdims=0) for one in outputs[1:]),
    ]
    shape = [batch, "length"]
    table = numpy_helper.from_array(word_table(seed), "table")
    graph = helper.make_graph(
        nodes,
        "words",
        [helper.make_tensor_value_info(name, kind, shape) for name in inputs],
        [
            helper.make_tensor_value_info(outputs[0], TensorProto.FLOAT, [*shape, DIM]),
            *(helper.make_tensor_value_info(one, TensorProto.FLOAT, [batch, DIM]) for one in outputs[1:]),
        ],
        [table],
    )
    return _save(path, graph, external, opset)


def image_graph(
    path: Path,
    *,
    output: str = "features",
    pooled: bool = True,
    shape: Sequence[int | str] = ("batch", 3, SIZE, SIZE),
    name: str = "pixel_values",
) -> Path:
    """Write a network of one convolution, with pooling or without."""
    rng = np.random.default_rng(5)
    weight = (rng.standard_normal((DIM, 3, 3, 3)) / 5).astype(np.float32)
    pooling = [
        helper.make_node("GlobalAveragePool", ["active"], ["mean"]),
        helper.make_node("Flatten", ["mean"], [output]),
    ]
    nodes = [
        helper.make_node("Conv", [name, "weight"], ["map"], kernel_shape=[3, 3], strides=[2, 2]),
        helper.make_node("Relu", ["map"], ["active" if pooled else output]),
        *(pooling if pooled else []),
    ]
    found = [shape[0], DIM] if pooled else [shape[0], DIM, None, None]
    graph = helper.make_graph(
        nodes,
        "pictures",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, found)],
        [numpy_helper.from_array(weight, "weight")],
    )
    return _save(path, graph, None, 13)


def text_folder(folder: Path, files: Mapping[str, Any] | None = None, **graph: Any) -> Path:
    """A folder with model.onnx for texts, its tokenizer, and other JSON files by name."""
    text_graph(folder / "model.onnx", **graph)
    (folder / "tokenizer.json").write_text(word_tokenizer().to_str())
    return described(folder, files or {})


def image_folder(folder: Path, files: Mapping[str, Any] | None = None, **graph: Any) -> Path:
    """A folder with model.onnx for images, and JSON files by name; timm's config.json by default."""
    image_graph(folder / "model.onnx", **graph)
    return described(folder, {"config.json": TIMM_CONFIG} if files is None else files)


def described(folder: Path, files: Mapping[str, Any]) -> Path:
    """Write JSON files by name."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def _save(path: Path, graph: Any, external: str | None, opset: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save_model(
        model,
        path,
        save_as_external_data=external is not None,
        location=external,
        size_threshold=0,
    )
    return path
