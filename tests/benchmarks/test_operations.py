"""The counted cost of networks that can be counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu.operations import cost_of
from models.backbone import Backbone
from models.spec import GRAPH_FILE
from tests.support.models import tiny_backbones


@pytest.mark.parametrize("count", [1, 3])
def test_convolutions_and_products_are_counted(tmp_path: Path, count: int) -> None:
    images = Backbone.open(tiny_backbones.image_export(tmp_path))
    cost = cost_of(
        images.path / GRAPH_FILE,
        images.feed([images.preprocess(tiny_backbones.picture(n)) for n in range(count)]),
    )
    first, second = 15 * 15 * 16, 7 * 7 * 32
    assert cost.operations == count * 2 * (first * 3 * 9 + second * 16 * 9)
    assert cost.weights == 16 * 3 * 9 + 32 * 16 * 9
    assert cost.activations == count * (3 * 32 * 32 + 2 * first + second)
    texts = Backbone.open(tiny_backbones.text_export(tmp_path))
    cost = cost_of(texts.path / GRAPH_FILE, texts.feed([np.arange(4, 14)] * count))
    assert cost.operations == count * 2 * 10 * tiny_backbones.TEXT_DIM**2
    assert cost.weights == tiny_backbones.TEXT_DIM**2
    assert cost.bytes(2) == 2 * (cost.weights + cost.activations)
