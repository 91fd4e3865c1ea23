"""Lines of the log of a real service, in both formats: the service, its worker, and the libraries."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.harness.service_process import Serving
from tests.support.models import tiny_backbones
from tests.support.service import faulty_service
from tests.support.service.client import Caller

SECRET = tiny_backbones.sentence(3)
KEY = "0123456789abcdef0123456789abcdef"
_COLUMNS = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z \[(info|warning) *\] .* \[[a-z.]+\]( \w+=\S+)*")


def run(folder: Path, form: str) -> str:
    """The log of a service that was asked a few times, did a job, and was ended."""
    more = {"TOPWORK_ADMIN_KEY": KEY, "TOPWORK_ODD": "1"} | ({"TOPWORK_LOG_FORMAT": form} if form else {})
    running = Serving(folder / "home", environment=faulty_service.environment(folder) | more)
    with running:
        caller = Caller(running.url, "acme")
        caller.http.headers["authorization"] = f"Bearer {KEY}"
        with caller.http:
            examples = [{"text": tiny_backbones.sentence(n), "label": "ab"[n % 2]} for n in range(8)]
            caller.adapt("pets", examples)
            caller.predict("pets", [{"text": SECRET}])
            rows = "".join(json.dumps(one) + "\n" for one in examples)
            headers = {"content-type": "application/x-ndjson"}
            job = caller.call("POST", "/adapt?adapter=bulk", 202, content=rows, headers=headers)
            while caller.call("GET", f"/jobs/{job['id']}")["state"] not in ("succeeded", "failed"):
                time.sleep(0.1)
            caller.call("GET", "/adapters/pets/versions/9", 404)
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(30)
    return running.log.read_text()


def test_json_by_default_where_nobody_watches(tmp_path: Path) -> None:
    log = run(tmp_path, "")
    lines = [json.loads(line) for line in log.splitlines()]
    for line in lines:
        assert {"event", "timestamp", "level", "logger"} <= line.keys()
    asked = [line for line in lines if line["logger"] == "topwork.access"]
    adapted, predicted, uploaded = (line for line in asked if line["method"] == "POST")
    assert (predicted["route"], predicted["status"]) == ("/predict", 200)
    assert (predicted["tenant"], predicted["adapter"]) == ("acme", "pets")
    assert predicted["bytes_in"] > len(SECRET)
    assert predicted["bytes_out"] > 0
    assert 0 < predicted["seconds"] < 60
    assert re.fullmatch("[0-9a-f]{32}", predicted["request_id"])
    assert (adapted["adapter"], uploaded["adapter"], uploaded["status"]) == ("pets", "bulk", 202)
    (lost,) = (line for line in asked if line["status"] == 404)
    assert (lost["route"], lost["adapter"]) == ("/adapters/{adapter}/versions/{version}", "pets")
    changed = [line for line in lines if line["logger"] == "topwork.audit"]
    assert [(line["event"], line["tenant"], line["key"]) for line in changed] == [
        ("POST /adapt 200", "acme", "operator"),
        ("POST /adapt 202", "acme", "operator"),
    ]
    assert any(re.fullmatch("job .* succeeded", line["event"]) for line in lines), "the worker's"
    assert any("TOPWORK_ODD" in line["event"] and line["level"] == "warning" for line in lines)
    assert SECRET not in log
    assert KEY not in log


def test_columns_where_they_are_asked_for(tmp_path: Path) -> None:
    log = run(tmp_path, "console")
    for line in log.splitlines():
        assert _COLUMNS.fullmatch(line), line
    assert re.search(r"POST /predict 200 +\[topwork.access\] adapter=pets .*tenant=acme", log)
    assert re.search(r"job \S+ succeeded", log)
    assert SECRET not in log
    assert KEY not in log


# The program logs as a library, warns, and raises an error that has a secret among its variables.
_PROGRAM = """
import logging, sys, warnings
from adapters.logs import configure_logging

for name in ("bentoml", "uvicorn.error"):
    logger = logging.getLogger(name)
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.propagate = False
configure_logging(sys.argv[1])
logging.getLogger("bentoml").warning("from a library", extra={"request_body": "a secret"})
logging.getLogger("uvicorn.error").error("from %s", "a server")
logging.getLogger("asyncio").warning("forged\\n2026-01-01T00:00:00Z [info] line")
warnings.warn("old")
try:
    key = "a secret"
    raise ValueError("no such thing")
except ValueError:
    logging.getLogger("topwork").exception("failed")
"""


def test_libraries_log_in_the_same_format() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, "json"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ""
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["logger"], line["level"]) for line in lines] == [
        ("bentoml", "warning"),
        ("uvicorn.error", "error"),
        ("asyncio", "warning"),
        ("py.warnings", "warning"),
        ("topwork", "error"),
    ]
    assert lines[1]["event"] == "from a server"
    assert "ValueError: no such thing" in lines[4]["exception"]
    assert "a secret" not in done.stderr


def test_batched_lines_keep_their_time_and_none_is_lost_at_the_end() -> None:
    program = """
import logging, sys, threading, time
from adapters.logs import configure_logging

configure_logging("json", batched=["batched"])
logger = logging.getLogger("batched")
logger.setLevel(logging.INFO)
logger.info("first")
logging.getLogger("topwork").info("between")
time.sleep(0.3)
threads = [threading.Thread(target=lambda: [logger.info("many") for _ in range(6_000)]) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
logger.info("last")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines[:2]] == ["between", "first"]
    assert lines[1]["timestamp"] < lines[0]["timestamp"]
    events = [line["event"] for line in lines]
    assert (events.count("many"), events.count("last")) == (24_000, 1)


@pytest.mark.parametrize("form", ["auto", "console"])
def test_columns_on_a_terminal(form: str) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM, form], stderr=theirs, text=True)
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while piece := os.read(ours, 65_536):
            written += piece
    os.close(ours)
    assert process.wait(60) == 0
    text = re.sub(r"\x1b\[[\d;]*m", "", written.decode())
    assert re.search(r"Z \[warning *\] from a library +\[bentoml\]", text)
    assert "ValueError: no such thing" in text
    assert "a secret" not in text
