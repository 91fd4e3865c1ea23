from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import datasets
from benchmarks.data.archives import DEFAULT_FOLDER
from benchmarks.training import backbones
from tests.support.models import tiny_backbones

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from benchmarks.data.embeddings import NotExported, embedded
folder, backbone, most = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
try:
    found = embedded("chatter-nl", folder, most=most, backbone=backbone)
except NotExported as error:
    sys.exit(str(error))
np.savez(folder / "found.npz", rows=found.rows, labels=found.labels)
"""


def _embedded(home: Path, folder: Path, backbone: str, most: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), backbone, str(most)],
        env=os.environ | {"BENTOML_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_set_is_embedded_once_and_only_what_is_missing(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "data"
    _with_data(folder)
    _, text = tiny_backbones.install(home)
    assert "embedding 0 of 10 inputs" in _embedded(home, folder, text, 10).stdout
    first = _found(folder)
    assert "embedding 0 of 15 inputs" in _embedded(home, folder, text, 25).stdout
    more = _found(folder)
    np.testing.assert_array_equal(more["rows"][:10], first["rows"])
    assert (len(more["rows"]), len(more["labels"])) == (25, 25)
    assert "embedding" not in _embedded(home, folder, text, 20).stdout
    np.testing.assert_array_equal(_found(folder)["rows"], more["rows"][:20])


def test_a_backbone_that_is_not_exported_is_named(tmp_path: Path) -> None:
    _with_data(tmp_path / "data")
    refused = _embedded(tmp_path / "home", tmp_path / "data", "minilm-l6-v2", 10)
    assert "minilm-l6-v2 is not exported; run `python -m models.export minilm-l6-v2`" in refused.stderr


def test_a_backbone_that_cannot_be_exported_is_missing() -> None:
    """The others would still be measured."""
    assert backbones.exported(["no-such-backbone"]) == (
        [],
        [backbones.Missing("no-such-backbone", "no backbone has this name")],
    )


def _with_data(folder: Path) -> None:
    """A folder with the fetched sets and without embeddings."""
    datasets.load("chatter-nl")
    folder.mkdir()
    (folder / "unpacked").symlink_to(DEFAULT_FOLDER / "unpacked")


def _found(folder: Path) -> dict[str, NDArray[Any]]:
    with np.load(folder / "found.npz") as arrays:
        return dict(arrays.items())
