"""`bentoml build`, and the built bento served from another folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import bentoml
import pytest
import yaml

from benchmarks.serving import ROOT, Serving
from models.exported import find_tag
from tests.service.test_startup import get, post, texts


@pytest.fixture(scope="module")
def home(serving: Serving, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BentoML home of its own, with the exports that the running service uses."""
    folder = tmp_path_factory.mktemp("bentoml")
    for name in ("efficientnet-lite0", "minilm-l6-v2"):
        tag = find_tag(name)
        assert tag is not None
        exported = Path(bentoml.models.get(tag).path)
        shutil.copytree(exported, folder / "models" / Path(*exported.parts[-2:]))
    return folder


@pytest.fixture(scope="module")
def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "true"}


@pytest.fixture(scope="module")
def bento(home: Path, environment: dict[str, str]) -> Path:
    subprocess.run(
        [sys.executable, "-m", "bentoml", "build"], cwd=ROOT, env=environment, check=True, capture_output=True
    )
    return home / "bentos" / "topwork" / (home / "bentos" / "topwork" / "latest").read_text().strip()


def test_the_models_named_are_the_backbones_specs() -> None:
    named = yaml.safe_load((ROOT / "bentofile.yaml").read_text())["models"]
    assert named == [find_tag("efficientnet-lite0"), find_tag("minilm-l6-v2")]


def test_the_bento_holds_the_service_and_nothing_else(bento: Path) -> None:
    source = {str(path.relative_to(bento / "src")) for path in (bento / "src").rglob("*") if path.is_file()}
    assert {"service/app.py", "adapters/registry.py", "models/session.py", "requirements.lock"} <= source
    assert not [
        name for name in source if name.endswith(".pyc") or name.split("/")[0] in {".venv", "tests", ".git"}
    ]
    assert any(name.startswith("adapters/migrations/versions/") for name in source)
    size = sum(path.stat().st_size for path in bento.rglob("*") if path.is_file())
    assert size < 200 << 20


def test_the_image_installs_the_lock_and_needs_no_network_at_start(bento: Path) -> None:
    dockerfile = (bento / "env" / "docker" / "Dockerfile").read_text()
    assert "python:3.11-slim" in dockerfile
    assert "OTEL_SDK_DISABLED" in dockerfile
    requirements = (bento / "env" / "python" / "requirements.txt").read_text()
    assert "--hash=sha256:" in requirements
    assert "pytest==" not in requirements
    named = yaml.safe_load((bento / "bento.yaml").read_text())["models"]
    assert {model["tag"] for model in named} == {find_tag("efficientnet-lite0"), find_tag("minilm-l6-v2")}


def test_the_bento_serves_from_another_folder(
    bento: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    tag = f"topwork:{bento.name}"
    # Proof that what answers is the bento's code and not the source that is installed here.
    with (bento / "src" / "service" / "__init__.py").open("a") as source:
        source.write('__version__ = "of-the-bento"\n')
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "bentoml", "serve", tag, "--host", "127.0.0.1", "--port", str(port)],
            cwd=tmp_path,
            env={**environment, "TOPWORK_HOME": str(tmp_path / "home")},
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, tmp_path / "log")
        assert post(f"{url}/adapt", {"adapter": "from-a-bento", "examples": texts(6)})["version"] == 1
        answer = post(f"{url}/predict", {"adapter": "from-a-bento", "inputs": [{"text": "holiday number 1"}]})
        assert answer["predictions"][0]["label"] == "holiday"  # type: ignore[index]
        image = (ROOT / "examples" / "images").rglob("*.png")
        raw = urllib.request.Request(
            f"{url}/embed?backbone=efficientnet-lite0",
            next(image).read_bytes(),
            {"content-type": "image/png"},
        )
        with urllib.request.urlopen(raw, timeout=30) as embedded:
            assert json.load(embedded)
        assert json.loads(get(f"{url}/nowhere")[1])["type"] == "urn:topwork:not_found"
        assert get(f"{url}/schema.json")[0] == 404
        assert b'version="of-the-bento"' in get(f"{url}/metrics")[1]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if get(f"{url}/readyz")[0] == 200:
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())
