"""An S3 server in this process, which keeps objects in memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import TracebackType


class S3Server:
    """A running server; a context manager. `url`: its address."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        from moto.server import ThreadedMotoServer

        # It logs every request.
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        self._server = ThreadedMotoServer(ip_address=address, port=0, verbose=False)
        self._server.start()
        self.url = "http://{}:{}".format(*self._server.get_host_and_port())

    def __enter__(self) -> S3Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop()


def store_options(url: str) -> dict[str, str]:
    """The options with which `open_store` and the service reach a server."""
    return {
        "endpoint": url,
        "region": "us-east-1",
        "access_key_id": "test",
        "secret_access_key": "test",
    }


def make_bucket(options: Mapping[str, str], name: str) -> str:
    """URL of a new bucket, with a prefix."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=options["endpoint"],
        region_name=options["region"],
        aws_access_key_id=options["access_key_id"],
        aws_secret_access_key=options["secret_access_key"],
    )
    client.create_bucket(Bucket=name)
    client.close()
    return f"s3://{name}/artifacts"
