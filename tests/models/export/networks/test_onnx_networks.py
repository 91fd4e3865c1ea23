"""ONNX graphs of other programs become exports with the same embeddings, or are refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from models.arrays import Floats
from models.backbone import Backbone
from models.export.loaders import load_network
from models.export.onnx_export import write
from models.runtime.cuda import lowest_cosine
from models.sources.source import ExportRefused
from models.spec import ImageTransform, TextTransform
from tests.support.models import tiny_backbones
from tests.support.models.onnx_graphs import (
    DIM,
    SIZE,
    TEXT_INPUTS,
    TIMM_CONFIG,
    image_folder,
    image_graph,
    text_folder,
    text_graph,
    word_table,
)

TEXTS = [tiny_backbones.sentence(1, 3), tiny_backbones.sentence(2, 9), "bal"]
CLS = {"1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}}
MODULES = [{"type": "sentence_transformers.models.Transformer"}, {"type": "a.Pooling"}]


def opened(entry: str, folder: Path) -> Backbone:
    network = load_network(entry)
    folder.mkdir()
    write(network, folder)
    return Backbone.open(folder)


def tokens(text: str, most: int = 512) -> Floats:
    tokenizer = tiny_backbones.word_tokenizer()
    tokenizer.enable_truncation(most)
    return word_table()[tokenizer.encode(text).ids]


def unit(rows: Floats) -> Any:
    return rows / np.linalg.norm(rows)


@pytest.mark.parametrize("inputs", [TEXT_INPUTS[:2], TEXT_INPUTS])
@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32])
def test_tokens_are_averaged_and_normalised(tmp_path: Path, inputs: tuple[str, ...], kind: int) -> None:
    backbone = opened(f"onnx:{text_folder(tmp_path / 'a', inputs=inputs, kind=kind)}", tmp_path / "b")
    known = np.stack([unit(tokens(text).mean(axis=0)) for text in TEXTS])
    np.testing.assert_allclose(backbone.embed(TEXTS).embeddings, known, atol=1e-6)
    assert backbone.spec.pooling == "mean, normalised"


def test_the_files_beside_it_decide_on_pooling_prompt_and_length(tmp_path: Path) -> None:
    files = CLS | {
        "modules.json": MODULES,
        "config.json": {"architectures": ["BertModel"], "max_position_embeddings": 512},
        "sentence_bert_config.json": {"max_seq_length": 5},
        "tokenizer_config.json": {"pad_token": "[UNK]", "model_max_length": 10**30},
        "config_sentence_transformers.json": {"prompts": {"q": "bal "}, "default_prompt_name": "q"},
        "1_Pooling/config.json": {"pooling_mode": "mean"},
    }
    backbone = opened(f"onnx:{text_folder(tmp_path / 'a', files)}", tmp_path / "b")
    known = np.stack([tokens("bal " + text, 5).mean(axis=0) for text in TEXTS])
    np.testing.assert_allclose(backbone.embed(TEXTS).embeddings, known, atol=1e-6)
    transform = backbone.spec.transform
    assert isinstance(transform, TextTransform)
    assert (transform.max_tokens, transform.pad_id, transform.prompt) == (5, 1, "bal ")
    assert (backbone.spec.architecture, backbone.spec.pooling) == ("BertModel", "mean")


def test_the_first_token_can_be_asked_for(tmp_path: Path) -> None:
    backbone = opened(f"onnx:{text_folder(tmp_path / 'a', CLS)}", tmp_path / "b")
    np.testing.assert_allclose(
        backbone.embed(TEXTS).embeddings, np.stack([unit(tokens(text)[0]) for text in TEXTS]), atol=1e-6
    )


def test_a_sentence_embedding_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = text_folder(
        tmp_path / "a", {"modules.json": MODULES}, outputs=("token_embeddings", "sentence_embedding")
    )
    network = load_network(f"onnx:{folder}")
    known = np.stack([tokens(text).mean(axis=0) for text in TEXTS])
    np.testing.assert_allclose(network.reference(TEXTS), known, atol=1e-6)
    assert network.spec.pooling == "in the graph"


def test_weights_in_a_file_of_their_own_are_in_the_export(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "a", external="model.onnx_data")
    backbone = opened(f"onnx:{folder}", tmp_path / "b")
    (folder / "model.onnx_data").unlink()
    assert backbone.embed(TEXTS).errors == {}


def test_images_with_timm_s_description(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "a", shape=("n", 3, "height", "width"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    backbone = opened(f"photos=onnx:{folder}", tmp_path / "b")
    assert backbone.spec.transform == ImageTransform(SIZE, 0.875, "bicubic", (0.5,) * 3, (0.25,) * 3, "fold")
    assert (backbone.spec.name, backbone.spec.dim, backbone.spec.licence) == ("photos", DIM, "mit")
    pictures = [tiny_backbones.picture(seed, (60, 48)) for seed in range(3)]
    reference = load_network(f"onnx:{folder}").reference(pictures)
    # The same but for rounding: timm resizes all of an image, and crops then.
    assert lowest_cosine(backbone.embed(pictures).embeddings, reference) > 0.99999


def test_a_map_of_features_is_averaged(tmp_path: Path) -> None:
    pooled = opened(f"onnx:{image_folder(tmp_path / 'a')}", tmp_path / "b")
    folder = image_folder(tmp_path / "c", pooled=False, output="last_hidden_state")
    mapped = opened(f"onnx:{folder}", tmp_path / "d")
    assert mapped.spec.pooling == "average"
    pictures = [tiny_backbones.picture(seed) for seed in range(2)]
    np.testing.assert_allclose(
        mapped.embed(pictures).embeddings, pooled.embed(pictures).embeddings, rtol=0, atol=1e-6
    )


PLAIN = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}


@pytest.mark.parametrize(
    ("config", "transform"),
    [
        (
            {"size": {"height": SIZE, "width": SIZE}, "resample": 2},
            ImageTransform(SIZE, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3, "squash"),
        ),
        (
            {
                "size": {"shortest_edge": 40},
                "crop_size": {"height": SIZE, "width": SIZE},
                "do_center_crop": True,
            },
            ImageTransform(SIZE, 0.8, "bicubic", (0.5,) * 3, (0.5,) * 3, "fold"),
        ),
        (
            {"size": {"shortest_edge": SIZE}, "crop_pct": 0.875, "do_normalize": False},
            ImageTransform(SIZE, 0.875, "bicubic", (0.0,) * 3, (1.0,) * 3, "fold"),
        ),
    ],
    ids=["squash", "crop", "crop_pct"],
)
def test_images_with_the_description_of_transformers(
    tmp_path: Path, config: dict[str, Any], transform: ImageTransform
) -> None:
    folder = image_folder(tmp_path / "a", {"preprocessor_config.json": PLAIN | config})
    assert load_network(f"onnx:{folder}").spec.transform == transform


def refusal(entry: str) -> str:
    with pytest.raises(ExportRefused) as refused:
        load_network(entry)
    return str(refused.value)


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        ({"batch": 1}, "has a fixed batch of 1 in its input input_ids. Export it with a dynamic batch"),
        ({"inputs": ("input_ids",)}, "takes input_ids and attention_mask"),
        ({"inputs": ("input_ids", "attention_mask", "position_ids")}, "position_ids. A network for texts"),
        ({"outputs": ("tokens", "a", "b")}, "has the outputs tokens, a, b, and which one"),
    ],
)
def test_graphs_for_texts_that_are_refused(tmp_path: Path, graph: dict[str, Any], said: str) -> None:
    assert said in refusal(f"onnx:{text_folder(tmp_path, **graph)}")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"1_Pooling/config.json": {"pooling_mode_max_tokens": True}},
            "asks for the pooling pooling_mode_max",
        ),
        (
            {"modules.json": [*MODULES, {"type": "sentence_transformers.models.Dense"}]},
            "lists a module Dense",
        ),
        (
            {
                "config_sentence_transformers.json": {"prompts": {"q": "x"}, "default_prompt_name": "q"},
                "1_Pooling/config.json": {"pooling_mode": "mean", "include_prompt": False},
            },
            "leaves its prompt out of the pooling",
        ),
    ],
)
def test_descriptions_of_texts_that_are_refused(tmp_path: Path, files: dict[str, Any], said: str) -> None:
    assert said in refusal(f"onnx:{text_folder(tmp_path, files)}")


def test_texts_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    said = refusal(f"onnx:{text_graph(tmp_path / 'onnx' / 'net.onnx')}")
    assert f"there is no tokenizer.json in {tmp_path}/onnx and {tmp_path}." in said
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "is not a tokenizer" in refusal(f"onnx:{tmp_path}/onnx/net.onnx")


@pytest.mark.parametrize(
    ("graph", "files", "said"),
    [
        ({"shape": (1, 3, SIZE, SIZE)}, None, "has a fixed batch of 1"),
        (
            {"shape": ("n", 3, 64, 64)},
            None,
            "takes images of 3 × 64 × 64, and the file beside it says 3 × 32 × 32",
        ),
        ({}, {}, "Add timm's config.json"),
        ({}, {"config.json": {"pretrained_cfg": {"input_size": [3, 32, 48]}}}, "square RGB images"),
        ({}, {"config.json": {"input_size": [3, SIZE, SIZE]}}, "does not say how images are prepared"),
        ({}, {"preprocessor_config.json": PLAIN}, "does not say how images are prepared"),
        ({}, {"preprocessor_config.json": PLAIN | {"size": {"longest_edge": 9}}}, "a way to resize"),
        ({}, {"preprocessor_config.json": PLAIN | {"size": {"height": 9, "width": 8}}}, "not square"),
    ],
)
def test_networks_for_images_that_are_refused(
    tmp_path: Path, graph: dict[str, Any], files: dict[str, Any] | None, said: str
) -> None:
    assert said in refusal(f"onnx:{image_folder(tmp_path, files, **graph)}")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"")
    assert "is not an ONNX model" in refusal(f"onnx:{path}")
    path.write_text("no graph at all")
    assert "is not an ONNX model" in refusal(f"onnx:{path}")
    image_graph(path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not JSON" in refusal(f"onnx:{path}")
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)
    (tmp_path / "config.json").write_text(json.dumps(TIMM_CONFIG))
    assert "ONNX Runtime cannot load" in refusal(f"onnx:{path}")
