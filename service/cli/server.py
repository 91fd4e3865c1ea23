"""`topwork serve` and `topwork worker`: the processes that run until they are interrupted."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import uvicorn


def _port(value: str) -> int:
    from service.environment import BadPort, parse_port

    try:
        return parse_port(value)
    except BadPort as error:
        raise typer.BadParameter(str(error)) from error


def serve(
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            parser=_port,
            metavar="PORT",
            help="Port to bind; 0 picks a free one. [default: the variable PORT, or 3000]",
        ),
    ] = None,
) -> None:
    """Serve predictions and adaptation over HTTP until interrupted."""
    # BentoML's application runs in this process: the supervisor of `bentoml serve` would add two seconds of
    # imports before its worker starts, and would hide that a worker cannot start.
    from service.environment import bind_port
    from service.settings import read_settings

    settings = read_settings()
    listener = _listen(host, bind_port() if port is None else port)

    import uvicorn

    from service.app import application
    from service.server.drain import DrainingServer

    server = DrainingServer(
        uvicorn.Config(
            application(),
            log_config=None,
            server_header=False,
            # The service never uses the client's address.
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=settings.drain_timeout,
        )
    )
    threading.Thread(target=_announce, args=(_url(listener), server), daemon=True).start()
    # uvicorn raises the signal again after draining; unhandled, it would set the exit status of a kill.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if not server.started:
        raise typer.Exit(1)


def worker() -> None:
    """Run jobs without serving, until interrupted.

    The jobs are those of all services that share the database.
    """
    from models.priority import give_way_but_for_commits
    from service.settings import read_settings, warn_of_unknown_settings

    writer = give_way_but_for_commits()
    settings = read_settings()

    from adapters.logs import configure_logging
    from adapters.workers.worker import work

    configure_logging(settings.log_format)
    warn_of_unknown_settings()
    settings.make_home()
    stopping = threading.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: stopping.set())
    work(settings.worker, stopping, writer)


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, from which the service also learns whether other machines can reach it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    listener.set_inheritable(False)
    # Connections inherit this option. asyncio sets it only on sockets that name their protocol, unlike those
    # of create_server. Without it every other answer waits 40 ms: its body is held back for the head's ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def _announce(url: str, server: uvicorn.Server) -> None:
    """Print the address once the service is ready."""
    # Imported here, because it would delay every other command.
    import urllib.request

    # A proxy that the environment names cannot reach this address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while not server.should_exit:
        try:
            with opener.open(f"{url}/readyz", timeout=600):
                print(f"Topwork is ready at {url}", flush=True)
                return
        except OSError:
            time.sleep(0.05)
