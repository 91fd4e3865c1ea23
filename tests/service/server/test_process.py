"""The command as a user runs it: processes of their own, real backbones, signals and exit statuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from benchmarks.harness.service_process import ROOT, DidNotStart, Serving
from tests.support.service import faulty_service
from tests.support.service.calls import KEY, get, post, texts
from tests.support.service.commands import bentoml_serve, topwork

NO_WORKERS = {"TOPWORK_WORKERS": "0"}


def mapped_libraries(pid: int) -> set[str]:
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {Path(line.split(maxsplit=5)[5]).name for line in maps if len(line.split(maxsplit=5)) == 6}


def test_the_serving_process_never_imports_torch(server: str, serving: Serving) -> None:
    adapted = post(f"{server}/adapt", {"adapter": "no-torch", "examples": texts(4)})
    assert adapted["version"] == 1
    predicted = post(f"{server}/predict", {"adapter": "no-torch", "inputs": [{"text": "a holiday"}]})
    assert predicted["predictions"]
    libraries = mapped_libraries(serving.process.pid)
    assert any(name.startswith("onnxruntime_pybind11_state") for name in libraries)
    assert not {
        name for name in libraries if "torch" in name or "sklearn" in name or name.startswith("onnx_cpp2py")
    }


def test_health_is_plain_text_and_everything_else_a_problem(server: str) -> None:
    for path in ("livez", "readyz", "healthz"):
        status, body, headers = get(f"{server}/{path}")
        assert (status, body.strip(), headers["content-type"].split(";")[0]) == (200, b"", "text/plain")
    for path in ("nowhere", "docs.json", "schema.json", "static_content/index.css", "docs/index.css"):
        status, body, headers = get(f"{server}/{path}")
        assert (status, headers["content-type"]) == (404, "application/problem+json"), path
        assert json.loads(body)["code"] == "not_found"


def test_the_documentation_needs_no_network(server: str) -> None:
    status, page, _ = get(f"{server}/docs")
    assert status == 200
    assert b"http://" not in page
    assert b"https://" not in page
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert asset.encode() in page
        assert get(f"{server}/docs/{asset}")[0] == 200
    document = json.loads(get(f"{server}/openapi.json")[1])
    assert {"/adapt", "/predict", "/embed", "/backbones", "/adapters"} <= set(document["paths"])


def test_metrics_tell_the_build_the_backbones_and_the_work(server: str) -> None:
    post(f"{server}/adapt", {"adapter": "measured", "examples": texts(4)})
    post(f"{server}/predict", {"adapter": "measured", "inputs": [{"text": "a holiday"}]})
    status, body, headers = get(f"{server}/metrics")
    text = body.decode()
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    for stage in ("tokenize", "queue", "embed", "head", "fit", "publish"):
        assert f'topwork_stage_seconds_count{{stage="{stage}"}}' in text
    for name in (
        'topwork_build_info{bentoml="',
        'topwork_backbone_info{backbone="minilm-l6-v2",device="cpu"',
        'topwork_queue_depth{backbone="efficientnet-lite0"} 0.0',
        'topwork_requests_total{method="POST",route="/adapt",status="200"}',
        "topwork_head_cache_hits_total",
        "topwork_head_cache_bytes",
        "topwork_adapts_total{outcome=",
        "topwork_batch_items_count{backbone=",
        "topwork_fits_queued 0.0",
        "topwork_ready 1.0",
        "topwork_live_versions",
    ):
        assert name in text, name
    assert "bentoml_service" not in text


def test_a_foreign_address_without_a_key_is_refused_in_one_line(tmp_path: Path) -> None:
    done = topwork("serve", "--host", "0.0.0.0", "--port", "0", TOPWORK_HOME=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("topwork: ")
    assert "TOPWORK_ADMIN_KEY" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOPWORK_DEVICE", "tpu"),
        ("TOPWORK_ADMIN_KEY", "short"),
        ("TOPWORK_MAX_INPUTS", "many"),
        ("TOPWORK_BACKBONES", "nothing-of-that-name"),
        ("PORT", "http"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_in_one_line(tmp_path: Path, name: str, value: str) -> None:
    done = topwork("serve", **{"PORT": "0", "TOPWORK_HOME": str(tmp_path), name: value})
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("topwork: ")
    assert name in last or value in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("TOPWORK_STORE_OPTIONS", "{", "TOPWORK_STORE_OPTIONS: this is no JSON"),
        ("TOPWORK_HOME", "/dev/null/home", "Set TOPWORK_HOME"),
        ("TOPWORK_DATABASE_URL", "sqlite:////nowhere/topwork.db", "/nowhere/topwork.db cannot be opened"),
        ("TOPWORK_DATABASE_URL", "postgresql+psycopg://me:hidden@127.0.0.1:1/x", "port 1"),
    ],
)
def test_storage_that_cannot_be_used_is_named_in_one_line(
    tmp_path: Path, name: str, value: str, words: str
) -> None:
    done = topwork("serve", **{"PORT": "0", "TOPWORK_HOME": str(tmp_path), name: value})
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "hidden" not in done.stderr


def test_a_start_with_another_database_touches_no_artifact(tmp_path: Path) -> None:
    """As after a typo in the URL, days after the artifacts were written."""
    home = tmp_path / "home"
    texts_only = NO_WORKERS | {"TOPWORK_BACKBONES": "minilm-l6-v2"}
    with Serving(home, environment=texts_only) as running:
        post(f"{running.url}/adapt", {"adapter": "kept", "examples": texts(6)})
        assert running.stop() == 0
    artifacts = [path for path in (home / "artifacts").rglob("*") if path.is_file()]
    for path in artifacts:
        os.utime(path, (time.time() - 3 * 86_400,) * 2)
    typo = {"TOPWORK_DATABASE_URL": f"sqlite:///{home / 'topwrok.db'}"}
    done = topwork("serve", "--port", "0", TOPWORK_HOME=str(home), **typo)
    assert (done.returncode, done.stdout) == (1, "")
    assert "belongs to another database" in done.stderr.splitlines()[-1]
    assert all(path.exists() for path in artifacts)

    (home / "topwork.db").rename(home / "lost.db")
    done = topwork("serve", "--port", "0", TOPWORK_HOME=str(home))
    assert done.returncode == 1
    assert "belongs to another database" in done.stderr.splitlines()[-1]
    assert all(path.exists() for path in artifacts)

    (home / "lost.db").rename(home / "topwork.db")
    with Serving(home, environment=texts_only) as running:
        asked = post(f"{running.url}/predict", {"adapter": "kept", "inputs": [{"text": "holiday number 9"}]})
    assert asked["version"] == 1


def test_children_know_no_secrets_and_files_are_the_users_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    environment = {
        "TOPWORK_ADMIN_KEY": KEY,
        "TOPWORK_DATABASE_URL": f"sqlite:///{home / 'topwork.db'}",
        "TOPWORK_STORE_OPTIONS": '{"secret_access_key": "x"}',
        "AWS_SECRET_ACCESS_KEY": "y",
    }
    with Serving(home, environment=faulty_service.environment(tmp_path) | environment) as running:
        children = [pid for pid in running.group() if pid != running.process.pid]
        assert len(children) >= 2
        for pid in children:
            entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            names = {entry.partition(b"=")[0].decode() for entry in entries}
            assert not names & set(environment) - {"AWS_SECRET_ACCESS_KEY"}
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            assert ("AWS_SECRET_ACCESS_KEY" in names) == (b"adapters.workers.worker" in command)
    shared = [path for path in home.rglob("*") if path.stat().st_mode & 0o077 and path != running.log]
    assert shared == []


@pytest.mark.parametrize("port", ["99999", "65536", "-1", "abc", "", "1e3", "80 ", "9" * 5_000])
def test_what_is_no_port_is_refused_in_one_line(port: str) -> None:
    done = topwork("serve", "--port", port)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("topwork serve: Invalid value for '--port': ")
    assert "from 1 to 65535" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["serve", "--prot", "80"], ["serv"], [], ["keys", "list"]])
def test_arguments_that_cannot_be_used_are_named_in_one_line(arguments: list[str]) -> None:
    done = topwork(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("topwork")
    assert "--help" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = topwork("serve", TOPWORK_HOME=str(tmp_path), PORT=port)
    assert done.returncode == 1
    assert port in done.stderr
    assert done.stderr.count("\n") == 1


def test_with_a_key_a_foreign_address_is_served_and_asks_for_it(tmp_path: Path) -> None:
    with Serving(
        tmp_path / "home",
        arguments=["--host", "0.0.0.0", "--port", "0"],
        environment=faulty_service.environment(tmp_path) | NO_WORKERS | {"TOPWORK_ADMIN_KEY": KEY},
    ) as running:
        assert get(f"{running.url}/readyz")[0] == 200
        assert get(f"{running.url}/metrics")[0] == 200
        assert get(f"{running.url}/backbones")[0] == 401
        assert get(f"{running.url}/backbones", authorization=f"Bearer {KEY}")[0] == 200
        assert KEY not in running.log.read_text()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_leaves_nothing_behind(tmp_path: Path, sign: signal.Signals) -> None:
    running = Serving(tmp_path, environment={"TOPWORK_BACKBONES": "minilm-l6-v2"})
    group = running.group()
    assert len(group) > 1, "the fitter runs in a process of its own"
    answers: list[dict[str, object]] = []
    request = {"adapter": "drained", "examples": texts(300)}
    caller = threading.Thread(target=lambda: answers.append(post(f"{running.url}/adapt", request)))
    caller.start()
    while 'topwork_queue_depth{backbone="minilm-l6-v2"} 0.0' in get(f"{running.url}/metrics")[1].decode():
        time.sleep(0.01)
    running.process.send_signal(sign)
    assert running.process.wait(30) == 0
    caller.join()
    assert answers[0]["version"] == 1
    assert running.group() == []


def test_a_service_that_drains_is_not_ready(tmp_path: Path) -> None:
    running = Serving(tmp_path / "home", environment=faulty_service.environment(tmp_path))
    place = urlsplit(running.url)
    assert place.hostname is not None
    connection = HTTPConnection(place.hostname, place.port, timeout=30)
    with closing(connection):
        statuses = []
        for sign in (signal.SIGTERM, None):
            connection.request("GET", "/readyz")
            answer = connection.getresponse()
            answer.read()
            statuses.append(answer.status)
            if sign is not None:
                running.process.send_signal(sign)
                time.sleep(0.3)
        assert statuses == [200, 503]
        assert answer.getheader("connection") == "close"
    assert running.process.wait(30) == 0


def test_a_signal_to_every_process_starts_none_again(tmp_path: Path) -> None:
    """As systemd sends it, and BentoML's supervisor."""
    running = Serving(tmp_path / "home", environment=faulty_service.environment(tmp_path))
    before = running.log.read_text()
    os.killpg(running.process.pid, signal.SIGTERM)
    assert running.process.wait(30) == 0
    since = running.log.read_text().removeprefix(before)
    assert "again" not in since
    assert '"warning"' not in since
    assert running.group() == []


def test_what_was_started_ends_when_the_service_is_killed(tmp_path: Path) -> None:
    running = Serving(tmp_path / "home", environment=faulty_service.environment(tmp_path))
    assert len(running.group()) > 1
    running.kill()
    deadline = time.monotonic() + 10
    while running.group() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running.group() == []


def test_a_dead_fitter_is_not_ready_or_replaced(server: str, serving: Serving) -> None:
    """It may be started again at once; what must not happen is that it is gone and the service says ready."""
    (fitter,) = [
        pid
        for pid in serving.group()
        if b"adapters.processes.fit_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(fitter, signal.SIGKILL)
    adapted = post(f"{server}/adapt", {"adapter": "after-a-dead-fitter", "examples": texts(4)})
    assert adapted["version"] == 1
    assert get(f"{server}/readyz")[0] == 200
    assert fitter not in serving.group()


def test_plain_bentoml_serve_refuses_a_foreign_address_without_a_key(tmp_path: Path) -> None:
    """Its default address is 0.0.0.0."""
    process = bentoml_serve(tmp_path)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "TOPWORK_ADMIN_KEY" in error.splitlines()[-1]


def test_plain_bentoml_serve_ends_when_its_worker_cannot_start(tmp_path: Path) -> None:
    """Instead of starting another one for ever."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    database = "postgresql+psycopg://nobody@127.0.0.1:1/nowhere"
    process = bentoml_serve(
        tmp_path, "--host", "127.0.0.1", "--port", str(port), TOPWORK_DATABASE_URL=database
    )
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "topwork: " in error


def test_did_not_start_tells_why(tmp_path: Path) -> None:
    with pytest.raises(DidNotStart, match="TOPWORK_THREADS"):
        Serving(tmp_path, environment={"TOPWORK_THREADS": "-1"})


def test_what_the_heap_keeps_between_blocks_is_given_back() -> None:
    program = """
import os, threading
from pathlib import Path
from service.server import process as startup

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

startup._TRIM_SECONDS = 0.1
blocks = [bytearray(b"x" * 100_000) for _ in range(1_000)]
del blocks[1:-1]
before = resident()
closing = threading.Event()
thread = threading.Thread(target=startup.trim_memory, args=(closing,))
thread.start()
threading.Event().wait(0.5)
closing.set()
thread.join(10)
print(before - resident(), thread.is_alive())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    given_back, alive = done.stdout.split()
    assert int(given_back) > 50_000_000
    assert alive == "False"
