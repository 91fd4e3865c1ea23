"""`make serve-cluster`: what its command starts, and that nothing of it is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.harness.service_process import ROOT
from deploy.cluster.__main__ import check_installed
from deploy.cluster.processes import NotInstalled
from tests.support.conditions import until
from tests.support.models import tiny_backbones
from tests.support.service.calls import get, post
from tests.support.storage import unavailable

PARTS = ["logs", "PostgreSQL", "S3", "replica 1", "replica 2", "worker", "HAProxy"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for temporary files that PostgreSQL's user may enter; its path marks processes."""
    try:
        check_installed()
    except NotInstalled as error:
        unavailable("haproxy", f"{error} is not installed")
    made = Path(tempfile.mkdtemp(prefix="topwork-test-cluster-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def marked(folder: Path) -> list[int]:
    """The running processes that have the folder for their temporary files."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"TMPDIR={folder}\0".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_cluster(folder: Path, tmp_path: Path, sign: signal.Signals) -> None:
    _, text = tiny_backbones.install(tmp_path / "bentoml", measured=True)
    environment = {
        **os.environ,
        "TMPDIR": str(folder),
        "PORT": "0",
        "BENTOML_HOME": str(tmp_path / "bentoml"),
        "TOPWORK_BACKBONES": text,
    }
    command = subprocess.Popen(
        [sys.executable, "-m", "deploy.cluster"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert command.stdout is not None
    with command.stdout as output:
        lines = dict([output.readline().rstrip().split("  ", 1) for _ in PARTS])
        assert list(lines) == PARTS
        url = lines["HAProxy"].split()[0]
        examples = [
            {"text": tiny_backbones.sentence(seed), "label": ("even", "odd")[seed % 2]} for seed in range(8)
        ]
        assert post(f"{url}/adapt", {"adapter": "a", "examples": examples})["version"] == 1
        assert get(f"{url}/adapters/a")[0] == 200
        assert len(marked(folder)) >= 6
        command.send_signal(sign)
        assert command.wait(120) == (0 if sign is signal.SIGINT else -signal.SIGKILL)
    until(lambda: not marked(folder))
    if sign is signal.SIGINT:
        assert not list(folder.glob("topwork-*"))


def test_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(NotInstalled, match="haproxy"):
        check_installed()
