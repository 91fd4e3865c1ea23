"""`bentoml build`, and the built bento served from another folder."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.harness.service_process import ROOT, Serving
from models.store.exports import find_tag
from tests.support import bentos
from tests.support.dockerfile import STORE_FOLDERS, Container, read
from tests.support.service.calls import KEY, get, post, texts
from tests.support.service.client import Caller
from tests.support.service.seclusion import REPORTED_BY, Seclusion

# BentoML's steps for each container engine.
CONTAINERIZE = """
import shutil
import sys

from bentoml._internal.bento import Bento
from bentoml._internal.container import construct_containerfile

with construct_containerfile(Bento.from_path(sys.argv[1]), enable_buildkit=False) as (context, dockerfile):
    shutil.copytree(context, sys.argv[2])
"""


@dataclass(frozen=True)
class Image:
    """An image without an engine: `root` stands for /home/bentoml; the packages are those of the tests."""

    container: Container
    root: Path

    def here(self, text: str) -> str:
        """A path, or a list of paths, of the image as it is called here."""
        programs = str(Path(sys.executable).parent)
        return text.replace("/app/.venv/bin", programs).replace("/home/bentoml", str(self.root))

    def start(self, arguments: Sequence[str] | None = None, **given: str) -> subprocess.Popen[str]:
        """`docker run` with variables of one's own: the image's command, unless it is given arguments."""
        arguments = self.container.arguments if arguments is None else arguments
        return self._start([*self.container.entrypoint, *arguments], given)

    def run(self, *command: str, **given: str) -> subprocess.CompletedProcess[str]:
        """`docker exec`, and what it writes."""
        process = self._start(command, given)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    @contextmanager
    def serving(self, **given: str) -> Iterator[None]:
        """A container that is ready, ended by SIGTERM."""
        process = self.start(**given)
        log: list[str] = []
        reader = threading.Thread(target=lambda: log.extend(process.stderr or ()))
        reader.start()
        url = f"http://127.0.0.1:{given['PORT']}"
        try:
            _wait_until_ready(url, process, lambda: "".join(log))
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(30)
            reader.join()
            process.communicate()
        assert status == 0, "".join(log)
        assert "is started again" not in "".join(log)

    def _start(self, command: Sequence[str], given: Mapping[str, str]) -> subprocess.Popen[str]:
        environment = {"HOME": "/home/bentoml", **self.container.environment}
        return subprocess.Popen(
            [self.here(part) for part in command],
            cwd=self.here(self.container.folder),
            env={**{name: self.here(value) for name, value in environment.items()}, **given},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(scope="module")
def home(serving: Serving, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BentoML home of its own, with the exports that the running service uses."""
    folder = tmp_path_factory.mktemp("bentoml")
    bentos.copy_exports(folder)
    return folder


@pytest.fixture(scope="module")
def environment(home: Path) -> dict[str, str]:
    return bentos.environment(home)


@pytest.fixture(scope="module")
def bento(home: Path) -> Path:
    return bentos.build(home)


def test_the_models_named_are_the_backbones_specs() -> None:
    named = yaml.safe_load((ROOT / "bentofile.yaml").read_text())["models"]
    assert named == [find_tag("efficientnet-lite0"), find_tag("minilm-l6-v2")]


def test_the_bento_holds_the_service_and_nothing_else(bento: Path) -> None:
    source = {str(path.relative_to(bento / "src")) for path in (bento / "src").rglob("*") if path.is_file()}
    assert {
        "service/app.py",
        "adapters/registry/registry.py",
        "models/runtime/session.py",
        "requirements.lock",
    } <= source
    assert not [
        name for name in source if name.endswith(".pyc") or name.split("/")[0] in {".venv", "tests", ".git"}
    ]
    assert any(name.startswith("adapters/registry/migrations/versions/") for name in source)
    size = sum(path.stat().st_size for path in bento.rglob("*") if path.is_file())
    assert size < 200 << 20


def test_the_image_installs_the_lock_and_needs_no_network_at_start(bento: Path) -> None:
    requirements = (bento / "env" / "python" / "requirements.txt").read_text()
    assert "--hash=sha256:" in requirements
    assert "pytest==" not in requirements
    named = yaml.safe_load((bento / "bento.yaml").read_text())["models"]
    assert {model["tag"] for model in named} == {find_tag("efficientnet-lite0"), find_tag("minilm-l6-v2")}


@pytest.fixture(scope="module")
def image(bento: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Image:
    """As an engine builds it of what `bentoml containerize` gives it, but for the packages."""
    root = tmp_path_factory.mktemp("image")
    command = [sys.executable, "-c", CONTAINERIZE, str(bento), str(root / "bento")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    container = read(
        root / "bento" / "env" / "docker" / "Dockerfile", {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    )
    (root / "bento" / "env" / "docker" / "entrypoint.sh").chmod(0o755)
    with (root / "bento" / "src" / "service" / "__init__.py").open("a") as source:
        source.write('__version__ = "of-the-image"\n')
    (root / "topwork").mkdir(mode=0o700)
    return Image(container, root)


def test_the_dockerfile_has_what_an_image_needs(image: Image) -> None:
    container = image.container
    assert container.base == "python:3.11-slim"
    assert container.volumes == [container.environment["TOPWORK_HOME"]]
    assert container.user == "bentoml"
    store = [f"{container.environment['BENTOML_HOME']}/{name}" for name in STORE_FOLDERS]
    folders = " ".join([container.environment["TOPWORK_HOME"], *store])
    assert f"install -d -o bentoml -g bentoml -m 700 {folders}" in container.runs
    assert container.environment["BENTOML_HOME"] == container.folder == "/home/bentoml/bento"
    silent = {"BENTOML_DO_NOT_TRACK": "true", "HF_HUB_DISABLE_TELEMETRY": "1", "ORT_DISABLE_TELEMETRY": "1"}
    assert silent.items() <= container.environment.items()
    assert container.environment["HF_HUB_OFFLINE"] == "1"
    assert container.environment["OTEL_SDK_DISABLED"] == "true"
    assert not [run for run in container.runs if "secret" in run or "apt-get" in run]
    (setup,) = (image.root / "bento" / "env" / "docker").glob("script__*")
    assert "/app/.venv/bin/topwork" in setup.read_text()
    assert any(setup.name in run for run in container.runs)


def test_the_uv_of_the_image_is_that_of_the_makefile(image: Image) -> None:
    (version,) = re.findall(r"^UV := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"pip install --no-cache-dir uv=={version}" in image.container.runs


@pytest.mark.parametrize("arguments", [None, []], ids=["its command", "bentoml"])
def test_the_image_does_not_start_without_a_key(image: Image, arguments: list[str] | None) -> None:
    """The service ends with one line that says so: a supervisor that retries would hide it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    done = image.start(arguments, PORT=str(port))
    _, log = done.communicate(timeout=120)
    assert done.returncode == 1
    (line,) = [line for line in log.splitlines() if line.startswith("topwork: ")]
    assert "TOPWORK_ADMIN_KEY" in line
    assert log.rstrip().endswith(line)


def test_the_image_keeps_its_data_in_the_volume(image: Image) -> None:
    """Two containers of it, one after the other, with the environment that the Dockerfile gives, a key and a
    port, and nothing else.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    given, url = {"TOPWORK_ADMIN_KEY": KEY, "PORT": str(port)}, f"http://127.0.0.1:{port}"
    asked = {"adapter": "kept", "inputs": [{"text": "holiday number 1"}]}
    caller = Caller(url, "default")
    caller.http.headers["Authorization"] = f"Bearer {KEY}"
    answers = []
    with caller.http:
        for start in range(2):
            with image.serving(**given):
                assert image.run(*image.container.check, **given).returncode == 0
                assert 'version="of-the-image"' in caller.http.get("/metrics").text
                if start == 0:
                    assert caller.adapt("kept", texts(6))["version"] == 1
                    made = image.run("topwork", "keys", "create", "default", "--note", "of the phone")
                    assert made.returncode == 0, made.stderr
                answers.append(caller.call("POST", "/predict", json=asked)["predictions"])
                listed = image.run("topwork", "keys", "list", "default")
                assert json.loads(listed.stdout)["note"] == "of the phone", listed.stderr
    assert answers[0] == answers[1]
    assert image.run(*image.container.check, **given).returncode == 1
    assert image.run("topwork", "doctor").returncode == 0
    backed_up = image.run("topwork", "backup", f"{image.container.environment['TOPWORK_HOME']}/backups")
    assert backed_up.returncode == 0, backed_up.stderr
    assert {path.name for path in (image.root / "topwork").iterdir()} >= {
        "topwork.db",
        "artifacts",
        "backups",
    }
    assert not (image.root / ".topwork").exists()


def test_a_worker_in_the_image_finds_the_exports(image: Image) -> None:
    """The worker runs without loading the bento, as `topwork worker` does."""
    program = "from models.store.exports import find; print(find('efficientnet-lite0'), find('minilm-l6-v2'))"
    found = image.run("python", "-c", program).stdout.split()
    assert [path.startswith(str(image.root / "bento" / "models")) for path in found] == [True, True]


@contextmanager
def served(bento: Path, folder: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """The URL of `bentoml serve` in another folder, ended by SIGTERM; its `log` is what it wrote."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "bentoml", "serve", f"topwork:{bento.name}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env={**environment, "TOPWORK_HOME": str(folder / "home")},
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, (folder / "log").read_text)
        yield url
    finally:
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert time.monotonic() - begun < 25
    # BentoML's supervisor sends the signal to what the service has started too.
    assert "is started again" not in (folder / "log").read_text()


def test_the_bento_serves_from_another_folder(
    bento: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    # Proof that what answers is the bento's code and not the source that is installed here.
    with (bento / "src" / "service" / "__init__.py").open("a") as source:
        source.write('__version__ = "of-the-bento"\n')
    with served(bento, tmp_path, environment) as url:
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
        assert json.loads(get(f"{url}/nowhere")[1])["code"] == "not_found"
        assert get(f"{url}/schema.json")[0] == 404
        assert b'version="of-the-bento"' in get(f"{url}/metrics")[1]


def test_the_bento_reports_nothing(bento: Path, home: Path, bare: Path, seclusion: Seclusion) -> None:
    """BentoML's supervisor does not either, though the service cannot set its environment."""

    def use() -> None:
        begun = time.monotonic()
        with served(bento, bare, {**os.environ, "BENTOML_HOME": str(home)}) as url:
            assert post(f"{url}/adapt", {"adapter": "quiet", "examples": texts(6)})["version"] == 1
            assert post(f"{url}/predict", {"adapter": "quiet", "inputs": [{"text": "a holiday"}]})
            time.sleep(max(0.0, REPORTED_BY - (time.monotonic() - begun)))

    seclusion.run(use)
    assert not seclusion.sent


def _wait_until_ready(url: str, process: subprocess.Popen[Any], log: Callable[[], str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log()
        try:
            if get(f"{url}/readyz")[0] == 200:
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log())
