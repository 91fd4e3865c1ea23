"""The `topwork` command."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from service.cli import plan, storage, tenants

if TYPE_CHECKING:
    import uvicorn


class Parser(argparse.ArgumentParser):
    """Reports invalid arguments in one line. Subcommands use the same class."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    # Files that a command writes are readable by their owner only.
    os.umask(0o077)
    parser = Parser(prog="topwork", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve until interrupted")
    serve.add_argument("--host", default="127.0.0.1", help="address to bind (default: %(default)s)")
    serve.add_argument(
        "--port", type=_port, default=None, help="port to bind, 0 for a free one (default: PORT, else 3000)"
    )
    commands.add_parser("worker", help="do the jobs of services that share the database, until interrupted")
    tenants.add_commands(commands)
    storage.add_commands(commands)
    plan.add_commands(commands)
    options = parser.parse_args(arguments)

    from service.settings import set_serving_environment

    # Libraries read these variables when they are imported.
    set_serving_environment()
    try:
        match options.command:
            case "serve":
                return _serve(options.host, options.port)
            case "worker":
                return _work()
            case name if name in storage.COMMANDS:
                return storage.run(options)
            case name if name in plan.COMMANDS:
                return plan.run(options)
            case _:
                return tenants.run(options)
    except Exception as error:
        from service.server.process import complain

        complain(error)
        return 1


def _port(value: str) -> int:
    from service.settings import BadPort, parse_port

    try:
        return parse_port(value)
    except BadPort as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _serve(host: str, port: int | None) -> int:
    # BentoML's application runs in this process: the supervisor of `bentoml serve` would add two seconds of
    # imports before its worker starts, and would hide that a worker cannot start.
    from service.settings import Settings, bind_port

    settings = Settings()
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
    return 0 if server.started else 1


def _work() -> int:
    from models.priority import give_way_but_for_commits
    from service.settings import Settings, warn_of_unknown_settings

    writer = give_way_but_for_commits()

    from adapters.jobs.worker import work
    from service.server.process import configure_logging

    configure_logging()
    settings = Settings()
    warn_of_unknown_settings()
    settings.make_home()
    stopping = threading.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: stopping.set())
    work(settings.worker, stopping, writer)
    return 0


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
    while not server.should_exit:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=600):
                print(f"Topwork is ready at {url}", flush=True)
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
