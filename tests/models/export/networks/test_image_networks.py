"""Checkpoints of timm's architectures: what is around the tensors, and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from models.export.loaders import load_network
from models.export.network import Network
from models.sources.source import ExportRefused
from models.spec import ImageTransform
from tests.support.models.tiny_backbones import picture

NET = "test_efficientnet"
State = dict[str, Any]


@pytest.fixture(scope="module")
def state() -> State:
    """The weights of a network with five classes, as a training saves them."""
    torch.manual_seed(4)
    found: State = timm.create_model(NET, num_classes=5).state_dict()
    return found


@pytest.fixture(scope="module")
def features(state: State) -> torch.Tensor:
    """What timm itself computes with these weights."""
    network = timm.create_model(NET, num_classes=5)
    network.load_state_dict(state)
    network.reset_classifier(0)
    with torch.inference_mode():
        return network.eval()(_pixels())


def _pixels() -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 160 * 160).reshape(2, 3, 160, 160)


def prefixed(state: Mapping[str, Any], prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def check(network: Network, features: torch.Tensor) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(network.forward(_pixels()), features)


@pytest.mark.parametrize(
    ("prefix", "container"),
    [("", None), ("module.", "state_dict"), ("model.", None), ("_orig_mod.module.", "model")],
)
def test_what_is_around_the_tensors_is_taken_off(
    tmp_path: Path, state: State, features: torch.Tensor, prefix: str, container: str | None
) -> None:
    tensors = prefixed(state, prefix)
    torch.save({container: tensors, "epoch": 3} if container else tensors, tmp_path / "a.pth")
    check(load_network(f"timm:{NET}@{tmp_path}/a.pth"), features)


def test_averaged_weights_are_preferred(tmp_path: Path, state: State, features: torch.Tensor) -> None:
    last = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save({"state_dict": last, "state_dict_ema": state}, tmp_path / "a.pth")
    check(load_network(f"timm:{NET}@{tmp_path}/a.pth"), features)


def test_safetensors_without_a_classifier(tmp_path: Path, state: State, features: torch.Tensor) -> None:
    save_file({n: v for n, v in state.items() if not n.startswith("classifier")}, tmp_path / "a.safetensors")
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    network = load_network(f"photos=timm:{NET}@{tmp_path}/a.safetensors")
    check(network, features)
    spec = network.spec
    assert (spec.name, spec.architecture, spec.licence, spec.dim) == ("photos", NET, "cc-by-4.0", 256)
    assert spec.source == f"timm:{NET}@{tmp_path}/a.safetensors"
    assert isinstance(spec.transform, ImageTransform)
    assert spec.transform.size == 160
    assert network.reference([picture(1)]).shape == (1, 256)


class Whole:
    """Stands for a network that was saved as an object."""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: Whole(), "holds something else than tensors, which could run code"),
        (lambda state: {"epoch": 3}, "holds no tensors by name"),
        (lambda state: [1, 2], "holds no tensors by name"),
        (lambda state: {"x.y": torch.zeros(1)}, "it lacks conv_stem.weight, bn1.weight, bn1.bias and "),
        (lambda state: state | {"other.weight": torch.zeros(1)}, "it has also other.weight."),
        (
            lambda state: state | {"conv_stem.weight": torch.zeros(1, 2)},
            "it has other shapes: conv_stem.weight is (1, 2) and should be (24, 3, 3, 3)",
        ),
    ],
    ids=["object", "no tensors", "a list", "another network", "more", "shapes"],
)
def test_checkpoints_that_do_not_fit_say_where(tmp_path: Path, state: State, change: Any, said: str) -> None:
    torch.save(change(state), tmp_path / "a.pth")
    with pytest.raises(ExportRefused) as refused:
        load_network(f"timm:{NET}@{tmp_path}/a.pth")
    assert said in str(refused.value)
    assert f"{tmp_path}/a.pth" in str(refused.value)


def refusal(entry: str) -> str:
    with pytest.raises(ExportRefused) as refused:
        load_network(entry)
    return str(refused.value)


def test_other_places_are_refused(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "a.pth")
    assert "timm knows no architecture 'resnet1'" in refusal(f"timm:resnet1@{tmp_path}/a.pth")
    assert "is a folder. Name a file in it" in refusal(f"timm:{NET}@{tmp_path}")
    for name, said in (
        ("b.pth", "something else than tensors"),
        ("b.safetensors", "is not a checkpoint"),
        ("empty.pth", "is not a checkpoint"),
    ):
        (tmp_path / name).write_bytes(b"" if "empty" in name else b"nothing of the kind")
        assert said in refusal(f"timm:{NET}@{tmp_path}/{name}")


def test_folders_that_are_not_timm_s_are_refused(tmp_path: Path, state: State) -> None:
    assert "has no safetensors weights" in refusal(f"timm:{tmp_path}")
    save_file(state, tmp_path / "model.safetensors")
    assert "has no config.json" in refusal(f"timm:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "its config.json names no architecture" in refusal(f"timm:{tmp_path}")
