"""No telemetry leaves the machine: no library reports to its maker."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE

from benchmarks.harness.service_process import Serving
from tests.support.service.calls import texts
from tests.support.service.client import Caller
from tests.support.service.seclusion import REPORTED_BY, Seclusion
from tests.support.service.uploads import NDJSON, upload


def test_the_seclusion_sees_names_and_addresses(seclusion: Seclusion) -> None:
    """So the tests below can fail."""

    def tell() -> None:
        with socket.create_server(("127.0.0.1", 0)) as here:
            socket.create_connection(here.getsockname(), timeout=5).close()
        with suppress(OSError):
            socket.create_connection(("192.0.2.7", 443), timeout=5)
        with suppress(OSError):
            socket.create_connection(("2001:db8::7", 443), timeout=5)
        with suppress(OSError):
            socket.getaddrinfo("reports.example", 443)

    seclusion.run(tell)
    time.sleep(0.5)
    addresses = {where for where in seclusion.sent if not where.endswith("reports.example")}
    assert addresses == {"192.0.2.7 port 443", "2001:db8::7 port 443"}
    assert any(where.endswith("port 53 reports.example") for where in seclusion.sent)


def test_a_service_from_its_first_start_on_reports_nothing(bare: Path, seclusion: Seclusion) -> None:
    """Nor does the program that exports. With an adapt, a predict and an upload, which a worker embeds; and
    beside it a program that uses a part alone.
    """

    def use() -> None:
        export = [sys.executable, "-m", "models.export", "minilm-l6-v2"]
        subprocess.run(export, check=True, env={**os.environ, **environment})
        with (
            subprocess.Popen(
                [sys.executable, "-c", "import models.runtime.session, sys; sys.stdin.read()"], stdin=PIPE
            ),
            Serving(bare / "home", environment=environment) as running,
        ):
            begun = time.monotonic()
            caller = Caller(running.url)
            with caller.http:
                assert caller.adapt("quiet", texts(6))["version"] == 1
                assert caller.predict("quiet", [{"text": "a holiday"}])["predictions"]
                lines = "\n".join(json.dumps(text) for text in texts(20)).encode()
                assert upload(caller, "adapter=many", lines, NDJSON)["state"] == "succeeded"
            time.sleep(max(0.0, REPORTED_BY - (time.monotonic() - begun)))

    environment = {"BENTOML_HOME": str(bare / "bentoml"), "TOPWORK_BACKBONES": "minilm-l6-v2"}
    seclusion.run(use)
    assert not seclusion.sent
    assert not (bare / ".cache" / "Microsoft").exists()
