"""A bento built in a BentoML home of its own, of the exports that are in the user's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import bentoml

from benchmarks.harness.service_process import ROOT
from models.store.exports import find_tag

BACKBONES = ("efficientnet-lite0", "minilm-l6-v2")


def copy_exports(home: Path) -> None:
    """Copies the exports that a bento needs into an empty BentoML home. They must be there."""
    for name in BACKBONES:
        tag = find_tag(name)
        assert tag is not None, f"{name} is not exported; run `python -m models.export`"
        exported = Path(bentoml.models.get(tag).path)
        shutil.copytree(exported, home / "models" / Path(*exported.parts[-2:]))


def environment(home: Path) -> dict[str, str]:
    """This process's, for BentoML's commands in that home."""
    return {**os.environ, "BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "true"}


def build(home: Path) -> Path:
    """The folder of a new bento in a home with exports."""
    command = [sys.executable, "-m", "bentoml", "build"]
    subprocess.run(command, cwd=ROOT, env=environment(home), check=True, capture_output=True)
    bentos = home / "bentos" / "topwork"
    return bentos / (bentos / "latest").read_text().strip()
