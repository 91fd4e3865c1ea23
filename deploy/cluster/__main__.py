"""Run PostgreSQL, an S3 server, two replicas, a worker and HAProxy until Ctrl-C; everything is temporary."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.harness.service_process import DidNotStart, Serving
from deploy.cluster.bucket import S3Server, make_bucket, store_options
from deploy.cluster.postgres import Postgres, find_postgres
from deploy.cluster.processes import NotInstalled, bound, launch
from deploy.cluster.proxy import HAProxy, find_haproxy

REPLICAS = 2


def main() -> int:
    """Return the exit status once everything has ended."""
    # Also where the shell has told its background processes to ignore Ctrl-C.
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.default_int_handler)
    try:
        with ExitStack() as parts:
            try:
                running = _start(parts)
                print("Ctrl-C ends all of it, and its data.", flush=True)
                while True:
                    time.sleep(0.5)
                    for name in [name for name, process in running.items() if process.poll() is not None]:
                        print(f"{name} ended with {running.pop(name).returncode}", flush=True)
            finally:
                # A second Ctrl-C would leave the rest running.
                for sign in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(sign, signal.SIG_IGN)
    except KeyboardInterrupt:
        return 0
    except NotInstalled as missing:
        print(f"Install what is missing: apt-get install --no-install-recommends {missing}", file=sys.stderr)
    except (DidNotStart, RuntimeError) as error:
        print(error, file=sys.stderr)
    return 1


def _start(parts: ExitStack) -> dict[str, subprocess.Popen[bytes] | subprocess.Popen[str]]:
    """Start the parts in order, say where each is, and have them end in the opposite order."""
    check_installed()
    running: dict[str, subprocess.Popen[bytes] | subprocess.Popen[str]] = {}
    home = Path(tempfile.mkdtemp(prefix="topwork-cluster-"))
    parts.callback(shutil.rmtree, home, ignore_errors=True)
    _say("logs", str(home))
    postgres = parts.enter_context(Postgres())
    running["PostgreSQL"] = postgres.process
    _say("PostgreSQL", postgres.url)
    s3 = parts.enter_context(S3Server())
    _say("S3", s3.url)
    options = store_options(s3.url)
    environment = {
        "TOPWORK_DATABASE_URL": postgres.url,
        "TOPWORK_STORE_URL": make_bucket(options, "topwork"),
        "TOPWORK_STORE_OPTIONS": json.dumps(options),
        "TOPWORK_WORKERS": "0",
    }
    replicas = []
    for number in range(1, REPLICAS + 1):
        # The first one makes the tables and exports the backbones.
        name = f"replica {number}"
        replica = parts.enter_context(
            Serving(home / name.replace(" ", "-"), launcher=bound(), environment=environment)
        )
        replicas.append(replica.url)
        running[name] = replica.process
        _say(name, replica.url)
    worker = launch(
        [*bound(), str(Path(sys.executable).with_name("topwork")), "worker"],
        home / "worker.log",
        {"TOPWORK_HOME": str(home / "worker"), **environment},
    )
    parts.callback(_end, worker)
    running["worker"] = worker
    _say("worker", f"process {worker.pid}")
    proxy = parts.enter_context(HAProxy(replicas, home, port=int(os.environ.get("PORT") or 3000)))
    running["HAProxy"] = proxy.process
    _say("HAProxy", f"{proxy.url} (its metrics: {proxy.metrics})")
    return running


def check_installed() -> None:
    """Raise NotInstalled with all packages that are missing."""
    missing = []
    for find in (find_postgres, find_haproxy):
        try:
            find()
        except NotInstalled as error:
            missing.append(str(error))
    if missing:
        raise NotInstalled(" ".join(missing))


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        process.wait(60)


def _say(name: str, address: str) -> None:
    print(f"{name:<11} {address}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
