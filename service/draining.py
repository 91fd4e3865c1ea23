"""How the server ends: what it has accepted, and what the system has accepted for it, is answered."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import uvicorn

from service.connections import connections


class Server(uvicorn.Server):
    """uvicorn's, but for its end. `bentoml serve` is given it too: see service/app.py."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more connections and answers on those that there are, for the time that drains have.

        Closing a listening socket resets the connections that wait in its queue, whose clients believe that
        they are connected and have sent their requests. A duplicate keeps it open until they are taken; then
        it is shut down for everybody who has it, such as BentoML's supervisor, in whose hands it would go on
        to accept connections that nobody answers.
        """
        connections.draining = True
        if self.config.timeout_graceful_shutdown is None:
            self.config.timeout_graceful_shutdown = connections.drain_seconds
        listeners = [listener.dup() for listener in sockets or ()]
        for server in self.servers:
            server.close()
        taken = [one for listener in listeners for one in take(listener)]
        await asyncio.gather(*map(self._serve_on, taken), return_exceptions=True)
        await super().shutdown(sockets)

    async def _serve_on(self, taken: socket.socket) -> None:
        loop = asyncio.get_running_loop()

        def protocol() -> asyncio.Protocol:
            made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
                _loop=loop,
            )
            return made

        await loop.connect_accepted_socket(protocol, taken, ssl=self.config.ssl)


def take(listener: socket.socket) -> list[socket.socket]:
    """The connections in the queue of a listening socket, which ends with them, whoever else has it."""
    taken: list[socket.socket] = []
    with listener, contextlib.suppress(OSError):
        listener.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = listener.accept()
                connection.setblocking(False)
                taken.append(connection)
        listener.shutdown(socket.SHUT_RD)
    return taken
