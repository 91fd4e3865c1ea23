"""Tiny but real backbones: seeded ONNX graphs with the same inputs, output and files as the exported ones."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from models.backbone import Backbone
from models.preprocess.pixels import with_byte_input
from models.runtime.autotune import ExecutionPlan, MeasuredPlan, keep_plan
from models.spec import (
    GRAPH_FILE,
    IDS,
    MANIFEST_FILE,
    MASK,
    OUTPUT_NAME,
    PIXELS,
    TOKENIZER_FILE,
    BackboneSpec,
    ImageTransform,
    Kind,
    TextTransform,
)
from models.store.exports import model_name
from models.store.manifest import write_manifest

IMAGE_NAME = "timm:tiny-image"
TEXT_NAME = "sentence-transformers:tiny-text"
IMAGE_DIM = 32
TEXT_DIM = 24
TOKENS = 64

_WORDS = tuple(a + b + c for a in "bdfklmnprst" for b in "aeiou" for c in ("", "n", "l"))


def image_export(folder: Path, crop_mode: str = "fold") -> Path:
    """Writes a tiny image backbone (32 pixels square, 32 dims) under folder; returns its export folder.

    crop_mode: "center" writes it as earlier releases did, whose graphs took floats.
    """
    rng = np.random.default_rng(1)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", [PIXELS, "w1", "b1"], ["c1"], kernel_shape=[3, 3], strides=[2, 2]),
            helper.make_node("Relu", ["c1"], ["r1"]),
            helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], kernel_shape=[3, 3], strides=[2, 2]),
            helper.make_node("Relu", ["c2"], ["r2"]),
            helper.make_node("GlobalAveragePool", ["r2"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], [OUTPUT_NAME]),
        ],
        "tiny-image",
        [helper.make_tensor_value_info(PIXELS, TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["batch", IMAGE_DIM])],
        [
            _weight(rng, "w1", (16, 3, 3, 3)),
            _weight(rng, "b1", (16,)),
            _weight(rng, "w2", (IMAGE_DIM, 16, 3, 3)),
            _weight(rng, "b2", (IMAGE_DIM,)),
        ],
    )
    spec = BackboneSpec(
        name=IMAGE_NAME,
        kind="image",
        source=IMAGE_NAME,
        architecture="tiny",
        dim=IMAGE_DIM,
        transform=ImageTransform(32, 0.875, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), crop_mode),
        pooling="average",
        licence="Apache-2.0",
        precision="float32",
        weights_sha256="1" * 64,
    )
    return _write(folder / "tiny-image", graph, spec)


def text_export(folder: Path) -> Path:
    """Writes a tiny text backbone (64 tokens, 24 dims, unit length) under folder; its export folder."""
    rng = np.random.default_rng(2)
    tokenizer = word_tokenizer()
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", IDS], ["tokens"]),
            helper.make_node("MatMul", ["tokens", "w"], ["mixed"]),
            helper.make_node("Tanh", ["mixed"], ["bent"]),
            helper.make_node("Cast", [MASK], ["float_mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["float_mask", "last"], ["wide_mask"]),
            helper.make_node("Mul", ["bent", "wide_mask"], ["masked"]),
            helper.make_node("ReduceSum", ["masked", "middle"], ["summed"], keepdims=0),
            helper.make_node("LpNormalization", ["summed"], [OUTPUT_NAME], axis=-1, p=2),
        ],
        "tiny-text",
        [
            helper.make_tensor_value_info(IDS, TensorProto.INT64, ["batch", "tokens"]),
            helper.make_tensor_value_info(MASK, TensorProto.INT64, ["batch", "tokens"]),
        ],
        [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["batch", TEXT_DIM])],
        [
            _weight(rng, "table", (tokenizer.get_vocab_size(), TEXT_DIM)),
            _weight(rng, "w", (TEXT_DIM, TEXT_DIM)),
            numpy_helper.from_array(np.array([2], np.int64), "last"),
            numpy_helper.from_array(np.array([1], np.int64), "middle"),
        ],
    )
    serialised = tokenizer.to_str().encode()
    spec = BackboneSpec(
        name=TEXT_NAME,
        kind="text",
        source=TEXT_NAME,
        architecture="tiny",
        dim=TEXT_DIM,
        transform=TextTransform(TOKENS, hashlib.sha256(serialised).hexdigest()),
        pooling="sum, normalised",
        licence="Apache-2.0",
        precision="float32",
        weights_sha256="2" * 64,
    )
    (folder / "tiny-text").mkdir(parents=True, exist_ok=True)
    (folder / "tiny-text" / TOKENIZER_FILE).write_bytes(serialised)
    return _write(folder / "tiny-text", graph, spec)


def image_backbone(folder: Path) -> Backbone:
    """The tiny image backbone, open on one CPU thread."""
    return Backbone.open(image_export(folder), threads=1)


def text_backbone(folder: Path) -> Backbone:
    """The tiny text backbone, open on one CPU thread."""
    return Backbone.open(text_export(folder), threads=1)


def install(bentoml_home: Path, crop_mode: str = "fold", *, measured: bool = False) -> tuple[str, str]:
    """Puts both into the BentoML model store of a home folder; the names that a service's settings use.

    crop_mode: of the image backbone; "center" is what earlier releases exported. measured: with the usual
    plans, which a service would need a second to measure at its first start.
    Written as BentoML writes a model, but without importing it: its configuration is fixed at the first
    import.
    """
    tiny = bentoml_home / "tiny"
    exports: tuple[tuple[str, Kind, Path], ...] = (
        (IMAGE_NAME, "image", image_export(tiny, crop_mode)),
        (TEXT_NAME, "text", text_export(tiny)),
    )
    for name, kind, folder in exports:
        version = "0" * 16
        target = bentoml_home / "models" / model_name(name) / version
        shutil.copytree(folder, target, dirs_exist_ok=True)
        (target / "model.yaml").write_text(
            f"name: {model_name(name)}\nversion: '{version}'\nbentoml_version: 1.4.39\n"
            "creation_time: '2026-01-01T00:00:00+00:00'\napi_version: v1\nmodule: ''\n"
            "labels: {}\noptions: {}\n"
            "metadata: {}\nsignatures: {}\n"
            "context:\n  framework_name: ''\n  framework_versions: {}\n  bentoml_version: 1.4.39\n"
            "  python_version: '3.11'\n"
        )
        (target.parent / "latest").write_text(version)
        if measured:
            usual = ExecutionPlan.usual(kind, "cpu", threads=len(os.sched_getaffinity(0)))
            keep_plan(target, usual, "cpu", MeasuredPlan(usual, others=0.0, spread=0.0))
    return IMAGE_NAME, TEXT_NAME


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """A PNG of smooth seeded colours; different seeds give different embeddings."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def sentence(seed: int, words: int = 8) -> str:
    """Seeded words of the tiny tokenizer's vocabulary."""
    return " ".join(np.random.default_rng(seed).choice(_WORDS, words))


def word_tokenizer() -> Tokenizer:
    """The tokenizer of the tiny text backbone: whole words of a small vocabulary."""
    vocabulary = {token: index for index, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return tokenizer


def _weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> TensorProto:
    scale = 1 / np.sqrt(np.prod(shape[1:]))
    return numpy_helper.from_array((rng.standard_normal(shape) * scale).astype(np.float32), name)


def _write(folder: Path, graph: onnx.GraphProto, spec: BackboneSpec) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    transform, content = spec.transform, model.SerializeToString(deterministic=True)
    if isinstance(transform, ImageTransform) and transform.crop_mode != "center":
        content = with_byte_input(content, transform)
        onnx.checker.check_model(content)
    (folder / GRAPH_FILE).write_bytes(content)
    write_manifest(folder, spec)
    if isinstance(transform, ImageTransform) and transform.crop_mode == "center":
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest | {"format": 3}))
    return folder
