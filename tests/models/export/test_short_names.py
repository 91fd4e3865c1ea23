"""Exports under short names: renamed, moved, changed; never is another network found under an old export."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models.onnx_graphs import text_folder, text_graph

ROOT = Path(__file__).parents[3]
# What is stored for each entry before, and then the export of each, with the fingerprint.
PROGRAM = """
import json, sys
from pathlib import Path
from models.export.onnx_export import export
from models.store.manifest import read_manifest
from models.store.exports import find

before = [find(entry) is not None for entry in sys.argv[1:]]
specs = [export(entry) and read_manifest(find(entry), verify=True) for entry in sys.argv[1:]]
print(json.dumps([before, [spec.name for spec in specs], [spec.fingerprint for spec in specs]]))
"""


def exported(home: Path, *entries: str) -> tuple[list[bool], list[str], list[str]]:
    """Export in a new process, because BentoML reads its home once; was it stored before, names, digests."""
    environment = os.environ | {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "true"}
    command = [sys.executable, "-c", PROGRAM, *entries]
    done = subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment)
    before, names, fingerprints = json.loads(done.stdout.splitlines()[-1])
    return before, names, fingerprints


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "bentoml"


def test_names_places_and_contents(tmp_path: Path, home: Path) -> None:
    one, two = text_folder(tmp_path / "one"), text_folder(tmp_path / "two", seed=3)
    entries = [f"mine=onnx:{one}", f"ours=onnx:{one}", f"onnx:{one}", f"mine=onnx:{two}"]
    before, names, first = exported(home, *entries)
    assert before == [False] * 4
    assert names == ["mine", "ours", f"onnx:{one}", "mine"]
    assert first[0] == first[1] == first[2]
    assert first[3] != first[0], "the name that was given to another network finds that network"

    shutil.move(one, tmp_path / "moved")
    text_graph(two / "model.onnx", seed=4)
    # A folder that is gone is served from its export, as in an image that holds exports only.
    again = [f"mine=onnx:{one}", f"mine=onnx:{tmp_path}/moved", f"mine=onnx:{two}"]
    before, _, second = exported(home, *again)
    assert before == [True, False, False]
    assert second[0] == second[1] == first[0], "a folder that moves is the same backbone"
    assert second[2] not in first, "a folder with other content is another backbone"

    text_graph(two / "model.onnx", seed=3)
    before, _, third = exported(home, f"mine=onnx:{two}")
    assert (before, third) == ([False], [first[3]])


def test_a_link_that_leads_elsewhere_finds_no_old_export(tmp_path: Path, home: Path) -> None:
    text_folder(tmp_path / "one")
    text_folder(tmp_path / "two", seed=3)
    current = tmp_path / "current"
    current.symlink_to(tmp_path / "one")
    _, _, first = exported(home, f"mine=onnx:{current}")
    current.unlink()
    current.symlink_to(tmp_path / "two")
    before, _, second = exported(home, f"mine=onnx:{current}")
    assert before == [False]
    assert second != first
