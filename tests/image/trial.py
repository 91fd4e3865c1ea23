"""`make test-image`: builds the images for real, and uses them as an operator does.

As root, in some minutes and 25 GB of disk. What stays, outside of the repository, is an image of Debian with
Python, made the first time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness.service_process import ROOT
from tests.image.buildah import BASE, Container, Engine, Volume
from tests.support.bentos import build, copy_exports, environment

IMAGE = "localhost/topwork:trial"
RAY_IMAGE = "localhost/topwork-ray:trial"
KEY = "0123456789abcdef0123456789abcdef"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "topwork-image"
EXAMPLES = [
    {"text": f"{word} number {number}", "label": word}
    for number in range(10)
    for word in ("invoice", "holiday")
]
ASKED = {"adapter": "kept", "inputs": [{"text": "a holiday by the sea"}, {"text": "an invoice of May"}]}


def main() -> int:
    """0 if the image does what is promised; raises what is wrong otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.image.trial", description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder that stays (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the image of Topwork too")
    options = parser.parse_args()
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        print(f"As root, after: apt-get install {' '.join(missing or ['buildah'])}", file=sys.stderr)
        return 1
    options.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="topwork-image-") as folder:
        scratch, engine = Path(folder), Engine(options.cache, Path(folder))
        try:
            build_image(engine, scratch)
            use_image(engine, scratch)
            build_ray_image(engine, scratch)
            use_ray_image(engine, scratch)
        finally:
            for image in (RAY_IMAGE, IMAGE):
                if not options.keep and engine.has(image):
                    engine.call("rmi", "--force", image)
    print("The images keep their promises.")
    return 0


@contextmanager
def step(what: str) -> Iterator[None]:
    """Prints what is done, and then how long it took."""
    begun = time.monotonic()
    print(f"{what} …", flush=True)
    yield
    print(f"  {time.monotonic() - begun:.0f} s", flush=True)


def build_image(engine: Engine, scratch: Path) -> None:
    """A bento of this checkout, and its image by `bentoml containerize`."""
    if not engine.has(BASE):
        with step("Making an image of Debian with Python"):
            engine.make_base()
    home, log = scratch / "bentoml", scratch / "build.log"
    with step("Building the bento"):
        copy_exports(home)
        bento = build(home)
    command = ["bentoml", "containerize", f"topwork:{bento.name}", "--backend", "buildah"]
    with step("Building the image: bentoml containerize --backend buildah"), log.open("wb") as file:
        subprocess.run(
            [sys.executable, "-m", *command, "--image-tag", IMAGE],
            cwd=ROOT,
            env={**engine.build_environment, **environment(home)},
            stdout=file,
            stderr=file,
        )
        # BentoML ends with 0 where the engine has failed.
        assert engine.has(IMAGE), log.read_text()[-8_000:]
    print(f"  {engine.size(IMAGE) / 1e9:.1f} GB")


def use_image(engine: Engine, scratch: Path) -> None:
    """Two containers of it, one after the other, with one volume."""
    found = engine.configuration(IMAGE)
    variables = dict(pair.split("=", 1) for pair in found["Env"])
    volume = Volume(scratch / "volume", variables["TOPWORK_HOME"])
    assert found["User"] == "bentoml"
    assert list(found["Volumes"]) == [volume.inside]
    kind, *check = found["Healthcheck"]["Test"]
    assert kind == "CMD"
    first, second = scratch / "first.log", scratch / "second.log"
    with (
        step("A first container: without a key, then with one"),
        engine.container(IMAGE, volume) as container,
    ):
        # The image does not keep this machine's package indexes.
        assert container.run("sh", "-c", "cat /etc/pip.conf /etc/uv/uv.toml 2>/dev/null || true") == ""
        refused_without_a_key(container, scratch / "refused.log")
        with serving(container, first) as (caller, port):
            container.run(*check, PORT=port)
            before = taught(caller)
            container.run("topwork", "keys", "create", "default", "--note", "of the phone")
    with step("A second one, with the volume of the first"), engine.container(IMAGE, volume) as container:
        with serving(container, second) as (caller, port):
            container.run(*check, PORT=port)
            after = answer(caller.post("/predict", json=ASKED))["predictions"]
            (key,) = map(json.loads, container.run("topwork", "keys", "list", "default").splitlines())
        container.run("topwork", "doctor")
        container.run("topwork", "backup", f"{volume.inside}/backups")
    assert before == after
    assert [one["label"] for one in after] == ["holiday", "invoice"]
    assert key["note"] == "of the phone"
    kept = {path.name for path in volume.folder.iterdir()}
    assert {"topwork.db", "artifacts", "backups"} <= kept, kept
    (owner,) = {path.lstat().st_uid for path in (volume.folder, *volume.folder.rglob("*"))}
    assert owner != 0
    print(f"  The volume has {', '.join(sorted(kept))}, all of user {owner}.")


def build_ray_image(engine: Engine, scratch: Path) -> None:
    """The image with Ray, as its Dockerfile says, of the one before."""
    log = scratch / "build-ray.log"
    command = f"buildah build --from {IMAGE} --tag {RAY_IMAGE} --file deploy/ray/Dockerfile ."
    with step("Building the image with Ray: buildah build"), log.open("wb") as file:
        done = subprocess.run(
            command.split(), cwd=ROOT, env=engine.build_environment, stdout=file, stderr=file
        )
    assert done.returncode == 0, log.read_text()[-8_000:]
    print(f"  {engine.size(RAY_IMAGE) / 1e9:.1f} GB")


def use_ray_image(engine: Engine, scratch: Path) -> None:
    """A head of a cluster, to which the worker's own module connects."""
    found = engine.configuration(RAY_IMAGE)
    volume = Volume(scratch / "ray-volume", dict(pair.split("=", 1) for pair in found["Env"])["TOPWORK_HOME"])
    assert found["User"] == "bentoml"
    head = f"ray start --head --port={free_port()} --num-cpus=2 --include-dashboard=false"
    look = "import ray, adapters.workers.ray_place; ray.init('auto'); print(ray.cluster_resources()['CPU'])"
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": KEY, "RAY_USAGE_STATS_ENABLED": "0"}
    with step("A container with a head of Ray"), engine.container(RAY_IMAGE, volume) as container:
        assert container.run("python", "-c", "import ray; print(ray.__version__)") == version("ray")
        said = container.run("sh", "-c", f'{head} >&2 && python -c "{look}"; ray stop >&2', **given)
        assert said == "2.0", said


def refused_without_a_key(container: Container, log: Path) -> None:
    """It ends at once, with one line that says what to do."""
    assert container.start(log, PORT=str(free_port())).wait(60) == 1
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("topwork: ")]
    assert "TOPWORK_ADMIN_KEY" in line


@contextmanager
def serving(container: Container, log: Path) -> Iterator[tuple[httpx.Client, str]]:
    """A caller of the container's service and its port; at the end it is told to end, and must."""
    port = str(free_port())
    begun = time.monotonic()
    running = container.start(log, PORT=port, TOPWORK_ADMIN_KEY=KEY)
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {KEY}"}, timeout=120
        ) as caller:
            while not ready(caller):
                assert running.poll() is None, log.read_text()
                assert time.monotonic() - begun < 300, log.read_text()
                time.sleep(0.2)
            print(f"  ready after {time.monotonic() - begun:.1f} s", flush=True)
            yield caller, port
        begun = time.monotonic()
        assert container.stop(running) == 0, log.read_text()
        print(f"  stopped within {time.monotonic() - begun:.1f} s", flush=True)
    finally:
        if running.poll() is None:
            container.stop(running, signal.SIGKILL)
    written = log.read_text()
    assert "exporting" not in written, written
    assert "started again" not in written, written


def ready(caller: httpx.Client) -> bool:
    """True if the service reports it."""
    try:
        return caller.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def taught(caller: httpx.Client) -> list[dict[str, Any]]:
    """Predictions of an adapter that was just made; a worker makes another one of an upload."""
    made = answer(caller.post("/adapt", json={"adapter": "kept", "examples": EXAMPLES}))
    assert made["live"], made
    lines = "\n".join(map(json.dumps, EXAMPLES))
    headers = {"Content-Type": "application/x-ndjson"}
    job = answer(caller.post("/adapt?adapter=uploaded", content=lines, headers=headers))
    while job["finished_at"] is None:
        time.sleep(0.2)
        job = answer(caller.get(f"/jobs/{job['id']}"))
    assert job["state"] == "succeeded", job
    predictions: list[dict[str, Any]] = answer(caller.post("/predict", json=ASKED))["predictions"]
    return predictions


def answer(response: httpx.Response) -> dict[str, Any]:
    """Its JSON, if it is none of an error."""
    assert response.status_code in (200, 202), response.text
    found: dict[str, Any] = response.json()
    return found


def free_port() -> int:
    """A port that is free at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(main())
