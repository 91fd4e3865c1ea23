"""Graceful shutdown: every connection that waits to be accepted when the service stops is answered."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import uvicorn

from service.server.connections import connections


class DrainingServer(uvicorn.Server):
    """uvicorn's server with another shutdown. `bentoml serve` uses it too: see bentoml_shell.py."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does. The application may refuse to: see check_server."""
        connections.protocol = self.config.http_protocol_class
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept what waits, answer on the open connections within the drain timeout, and close.

        Closing a listening socket resets the connections in its queue, although their clients believe that
        they are connected and have sent requests. A duplicate keeps the socket open until they are accepted.
        """
        connections.draining = True
        if self.config.timeout_graceful_shutdown is None:
            self.config.timeout_graceful_shutdown = connections.drain_seconds
        listeners = [listener.dup() for listener in sockets or ()]
        for server in self.servers:
            server.close()
        accepted = [one for listener in listeners for one in accept_backlog(listener)]
        await asyncio.gather(*map(self._serve_on, accepted), return_exceptions=True)
        await super().shutdown(sockets)

    async def _serve_on(self, accepted: socket.socket) -> None:
        loop = asyncio.get_running_loop()

        def protocol() -> asyncio.Protocol:
            made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
                _loop=loop,
            )
            return made

        await loop.connect_accepted_socket(protocol, accepted, ssl=self.config.ssl)


def accept_backlog(listener: socket.socket) -> list[socket.socket]:
    """Return the connections that wait on a listening socket, and stop it for all processes that share it.

    BentoML's supervisor shares it, so it would otherwise accept connections that no process answers. The
    supervisor can listen on it again for another worker.
    """
    accepted: list[socket.socket] = []
    with listener, contextlib.suppress(OSError):
        listener.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = listener.accept()
                connection.setblocking(False)
                accepted.append(connection)
        # A client that connects between the last accept and this call is reset.
        listener.shutdown(socket.SHUT_RD)
    return accepted
