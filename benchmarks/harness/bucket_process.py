"""An S3 server in a process of its own, which can be stopped so that it accepts requests and answers none."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import TracebackType

_START_SECONDS = 120.0


class BucketProcess:
    """A running moto server with one empty bucket; a context manager."""

    def __init__(self) -> None:
        """Returns once the server answers. Raises TimeoutError."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port: int = free.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._await()
            self._make_bucket()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """The bucket, with a prefix, as TOPWORK_STORE_URL has it."""
        return "s3://topwork/artifacts"

    @property
    def options(self) -> dict[str, str]:
        """The options with which `open_store` reaches the server."""
        return {
            "endpoint": f"http://127.0.0.1:{self._port}",
            "region": "us-east-1",
            "access_key_id": "test",
            "secret_access_key": "test",
        }

    @property
    def environment(self) -> dict[str, str]:
        """The settings of a service that stores its artifacts in the bucket."""
        return {"TOPWORK_STORE_URL": self.url, "TOPWORK_STORE_OPTIONS": json.dumps(self.options)}

    def hang(self) -> None:
        """Stop the process: the kernel goes on to accept connections, and no request is answered."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let the process go on."""
        os.kill(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        """Kill the server."""
        self.process.kill()
        self.process.wait()

    def _await(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), 1.0).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > end:
                    raise TimeoutError("the S3 server does not start") from None
                time.sleep(0.05)

    def _make_bucket(self) -> None:
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=self.options["endpoint"],
            region_name=self.options["region"],
            aws_access_key_id=self.options["access_key_id"],
            aws_secret_access_key=self.options["secret_access_key"],
        )
        client.create_bucket(Bucket="topwork")
        client.close()

    def __enter__(self) -> BucketProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
