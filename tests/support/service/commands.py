"""Commands as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.service_process import ROOT


def topwork(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `topwork` with the arguments until it ends."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("topwork")), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def bentoml_serve(home: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start `bentoml serve` from the source tree."""
    return subprocess.Popen(
        [sys.executable, "-m", "bentoml", "serve", "service.app:Topwork", *arguments],
        cwd=ROOT,
        env={**os.environ, "TOPWORK_HOME": str(home), "BENTOML_DO_NOT_TRACK": "true", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_topwork(home: Path, *arguments: str, status: int = 0, **environment: str) -> list[dict[str, Any]]:
    """Run `topwork` with this home, check its exit status, and return what it printed: lines of JSON."""
    done = topwork(*arguments, TOPWORK_HOME=str(home), **environment)
    assert done.returncode == status, done.stdout + done.stderr
    if status and not done.stdout:
        return [{"complaint": done.stderr}]
    return [json.loads(line) for line in done.stdout.splitlines()]
