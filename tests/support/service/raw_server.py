"""Our server and our protocol around an application of a few lines, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import socket
import threading
from types import TracebackType

import uvicorn
import uvloop
from starlette.types import ASGIApp

from service.server.connections import ConnectionTable
from service.server.drain import DrainingServer
from service.server.protocol import BoundedHttpProtocol


class Bare:
    """A context manager; `url` and `address` are where it answers, `connections` those that it has."""

    def __init__(self, app: ASGIApp, connections: ConnectionTable) -> None:
        """The protocol's own connections must be these by now."""
        self.connections = connections
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address = self.listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.loop = uvloop.new_event_loop()
        config = uvicorn.Config(
            app, http=BoundedHttpProtocol, log_config=None, lifespan="off", timeout_keep_alive=60
        )
        self.server = DrainingServer(config)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self.server.serve(sockets=[self.listener]))
        self.loop.close()

    def stop(self) -> None:
        """Has it drain, and waits until it has ended."""
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def __enter__(self) -> Bare:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
