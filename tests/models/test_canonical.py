"""The packaged backbones, as exported and served, against timm's and sentence-transformers' embeddings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.backbone import Backbone
from models.exported import find
from models.manifest import read_tables
from models.spec import FLOAT32, HALF_FILE
from tests.models import canonical

ROOT = Path(__file__).parents[2]

# Between a backbone and torch. 8 bits cost what they cost; the quality benchmark says what it is worth.
LEAST_COSINE = {
    "efficientnet-lite0": canonical.MIN_COSINE,
    "minilm-l6-v2": canonical.MIN_COSINE,
    "efficientnet-lite0-int8": 0.94,
    "minilm-l6-v2-int8": 0.95,
}


@pytest.fixture(scope="module", params=list(LEAST_COSINE))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """Exported where it is not yet, which takes a minute once."""
    name: str = request.param
    if find(name) is None:
        subprocess.run([sys.executable, "-m", "models.export", name], check=True, cwd=ROOT)
    folder = find(name)
    assert folder is not None
    return Backbone.open(folder, threads=2)


def test_embeddings_are_the_reference_s(backbone: Backbone) -> None:
    inputs = canonical.pictures() if backbone.spec.kind == "image" else list(canonical.TEXTS)
    answer = backbone.embed(inputs)
    assert answer.errors == {}
    name = backbone.spec.name
    with np.load(canonical.FILE, allow_pickle=False) as stored:
        reference = stored[name.removesuffix("-int8")]
    assert canonical.cosines(answer.embeddings, reference).min() >= LEAST_COSINE[name]


def test_large_tables_lie_beside_the_graph(backbone: Backbone) -> None:
    shapes = [np.load(path, mmap_mode="r").shape for path in read_tables(backbone.path).values()]
    assert shapes == ([(30_522, 384)] if backbone.spec.kind == "text" else [])


def test_single_precision_has_a_form_in_half_precision(backbone: Backbone) -> None:
    assert (backbone.path / HALF_FILE).exists() == (backbone.spec.precision == FLOAT32)


def test_together_equals_alone(backbone: Backbone) -> None:
    inputs = canonical.pictures() if backbone.spec.kind == "image" else list(canonical.TEXTS)
    together = backbone.embed(inputs).embeddings
    alone = np.concatenate([backbone.embed([one]).embeddings for one in inputs])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_the_stored_references_are_torch_s() -> None:
    """Computes them again; in a process of its own, for torch stays in the process that imports it."""
    subprocess.run(
        [sys.executable, "-m", "tests.models.canonical"],
        check=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
