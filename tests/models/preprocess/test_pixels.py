"""Networks that take pictures as bytes compute what those that took floats did, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from models.backbone import Backbone
from models.preprocess.pixels import normalised, with_byte_input
from models.protobuf import InvalidGraph
from models.spec import GRAPH_FILE, OUTPUT_NAME, PIXELS, RGB, ImageTransform
from tests.support.models import tiny_backbones

# Means and deviations of ImageNet, of which none is a sum of powers of two.
TRANSFORM = ImageTransform(32, 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def run(
    model: bytes, **feed: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([OUTPUT_NAME], feed)[0])


@pytest.fixture
def floats(tmp_path: Path) -> bytes:
    """A graph as earlier releases exported it."""
    return (tiny_backbones.image_export(tmp_path, crop_mode="center") / GRAPH_FILE).read_bytes()


def test_the_embeddings_are_the_same_to_the_last_bit(floats: bytes) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
    rgb[0], rgb[1] = 0, 255
    changed = with_byte_input(floats, TRANSFORM)
    onnx.checker.check_model(changed)
    np.testing.assert_array_equal(
        run(changed, **{RGB: rgb}), run(floats, **{PIXELS: normalised(rgb, TRANSFORM)})
    )


def test_what_takes_bytes_stays_as_it_is(floats: bytes) -> None:
    changed = with_byte_input(floats, TRANSFORM)
    assert with_byte_input(changed, TRANSFORM) is changed


def test_what_has_neither_input_is_refused(tmp_path: Path) -> None:
    texts = (tiny_backbones.text_export(tmp_path) / GRAPH_FILE).read_bytes()
    with pytest.raises(InvalidGraph, match="pixels"):
        with_byte_input(texts, TRANSFORM)
    with pytest.raises(InvalidGraph, match="truncated"):
        with_byte_input(texts[:-5], TRANSFORM)


def test_exports_and_networks_of_earlier_releases_answer_alike(tmp_path: Path, floats: bytes) -> None:
    old = Backbone.open(tiny_backbones.image_export(tmp_path / "old", crop_mode="center"))
    new = Backbone.open(tiny_backbones.image_export(tmp_path / "new"))
    tuned = new.with_network(floats)
    pictures = [tiny_backbones.picture(seed) for seed in range(5)]
    expected = new.embed(pictures).embeddings
    np.testing.assert_array_equal(old.embed(pictures).embeddings, expected)
    np.testing.assert_array_equal(tuned.embed(pictures).embeddings, expected)
