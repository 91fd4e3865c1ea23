"""Graceful shutdown: every connection accepted by the server, or by the kernel for it, is answered."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import socket
import struct

import uvicorn

from service.server.connections import connections

# Time for handshakes in progress to complete.
_SETTLE_SECONDS = 0.1

# Linux's option numbers, and a BPF program: drop packets with the SYN flag, in byte 13 of the TCP header.
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_NO_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))


class DrainingServer(uvicorn.Server):
    """uvicorn's server with another shutdown. `bentoml serve` uses it too: see service/app.py."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting connections and answer on the open ones, within the drain timeout.

        Closing a listening socket resets the connections in its queue, although their clients believe that
        they are connected and have sent requests. So new handshakes are stopped first; then a duplicate keeps
        the socket open until the queue is empty.
        """
        connections.draining = True
        if self.config.timeout_graceful_shutdown is None:
            self.config.timeout_graceful_shutdown = connections.drain_seconds
        listeners = [listener.dup() for listener in sockets or ()]
        for listener in listeners:
            begin_no_more(listener)
        await asyncio.sleep(_SETTLE_SECONDS)
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


def begin_no_more(listener: socket.socket) -> None:
    """Drop new SYN packets: clients try again after a second, and are refused then.

    Does nothing if the system has no such filter.
    """
    listener.setblocking(False)
    code = b"".join(struct.pack("HBBI", *line) for line in _NO_SYN)
    kept = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(_NO_SYN), ctypes.addressof(kept))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def take(listener: socket.socket) -> list[socket.socket]:
    """Return the connections in the queue of a listening socket, and stop it for all processes that share it.

    BentoML's supervisor shares it, so it would otherwise accept connections that no process answers. The
    supervisor can listen on it again for another worker.
    """
    taken: list[socket.socket] = []
    with listener, contextlib.suppress(OSError):
        listener.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = listener.accept()
                connection.setblocking(False)
                taken.append(connection)
        listener.shutdown(socket.SHUT_RD)
        listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
    return taken
