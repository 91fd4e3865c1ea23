"""Folders of transformers, which say nothing about pooling."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from models.export.loaders import load_network
from models.sources.source import ExportRefused
from models.spec import TextTransform
from tests.support.models.random_models import make_models


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of sentence-transformers in `mean`, and the BERT that it was made of in `mean-bert`."""
    folder = tmp_path_factory.mktemp("networks")
    make_models(folder, "mean")
    return folder


def test_a_transformers_folder_has_mean_pooling_and_normalisation(networks: Path) -> None:
    texts = ["a", "b c d", "abc def ghi"]
    (networks / "mean-bert" / "README.md").write_text("---\nlicense: mit\n---\n")
    plain = load_network(f"bert=transformers:{networks}/mean-bert")
    whole = load_network(f"sentence-transformers:{networks}/mean")
    np.testing.assert_allclose(plain.reference(texts), whole.reference(texts), atol=1e-6)
    assert (plain.spec.name, plain.spec.licence, plain.spec.dim) == ("bert", "mit", 32)
    assert plain.spec.pooling == "pooling, normalize"
    assert isinstance(plain.spec.transform, TextTransform)
    assert plain.spec.transform.max_tokens == 64
    assert plain.spec.fingerprint != whole.spec.fingerprint


def test_the_name_and_the_place_do_not_change_the_fingerprint(networks: Path, tmp_path: Path) -> None:
    before = load_network(f"bert=transformers:{networks}/mean-bert").spec
    shutil.copytree(networks / "mean-bert", tmp_path / "elsewhere")
    after = load_network(f"ours=transformers:{tmp_path}/elsewhere").spec
    assert (before.name, after.name) == ("bert", "ours")
    assert before.fingerprint == after.fingerprint


@pytest.mark.parametrize(
    ("library", "without", "with_", "said"),
    [
        ("transformers", ["config.json"], [], "has no config.json"),
        ("transformers", ["model.safetensors"], [], "has no safetensors weights"),
        ("transformers", ["tokenizer.json", "vocab.txt"], [], "has no tokenizer.json. Save the tokenizer"),
        (
            "transformers",
            ["tokenizer.json", "vocab.txt"],
            ["preprocessor_config.json"],
            "it is a network for images. Convert it for timm",
        ),
        ("transformers", [], ["modules.json"], "Use sentence-transformers:"),
        ("sentence-transformers", ["tokenizer.json", "vocab.txt"], [], "has no tokenizer.json"),
        (
            "sentence-transformers",
            ["model.safetensors"],
            ["x.safetensors"],
            "sentence-transformers cannot load",
        ),
    ],
)
def test_incomplete_folders_say_what_is_missing(
    networks: Path, tmp_path: Path, library: str, without: list[str], with_: list[str], said: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(networks / "mean-bert", folder)
    for name in without:
        (folder / name).unlink()
    for name in with_:
        (folder / name).write_text("{}")
    with pytest.raises(ExportRefused) as refused:
        load_network(f"{library}:{folder}")
    assert said in str(refused.value)
    assert str(folder) in str(refused.value)
