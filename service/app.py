"""The BentoML service: builds all components at start-up and answers requests through our edge."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from typing import Any, NoReturn

import bentoml
from starlette.types import ASGIApp

from adapters.logs import configure_logging
from service.edge.gateway import Edge
from service.environment import serving_environment, set_serving_environment
from service.server.bentoml_shell import configured_host, shell_around, stop_tracking
from service.server.connections import connections
from service.server.image import image
from service.server.overrides import check_server
from service.server.process import (
    explain,
    give_back_memory,
    give_up,
    raise_descriptor_limit,
)
from service.settings import Settings, warn_of_unknown_settings

edge = Edge()

# Thresholds for `gc.set_threshold`: new objects, then collections of generations 0 and 1. Python's defaults
# are 700, 10, 10.
_COLLECT_AFTER = (10_000, 20, 100)
_SWITCH_SECONDS = 0.0005


class TooManyWorkers(RuntimeError):
    """BentoML was told to start more than one worker."""

    code = "too_many_workers"


@bentoml.service(
    name="topwork",
    service_class=shell_around(edge),
    image=image(),
    workers=1,
    envs=[{"name": name, "value": value} for name, value in serving_environment().items()],
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Topwork:
    """One frozen backbone, a private head for every tenant: adapt on posted examples, predict over REST."""

    @bentoml.on_deployment
    def prepare() -> None:
        """Reject invalid settings in BentoML's supervising process, before any worker starts."""
        import click

        from service.edge.auth import Authenticator

        set_serving_environment()
        stop_tracking()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, _stop_supervising)
        context = click.get_current_context(silent=True)
        host = context.params.get("host") if context else None
        try:
            settings = Settings()
            configure_logging(settings.log_format)
            if context is not None:
                Authenticator(settings.admin_key, [host or configured_host()])
        except Exception as error:
            raise SystemExit(f"topwork: {explain(error)}") from None

    @bentoml.on_startup
    async def start(self) -> None:
        """Build all components. If that fails, the process exits with a one-line explanation."""
        from service.api.app import build_api
        from service.composition import compose
        from service.edge.auth import Authenticator, listening_addresses

        # `topwork serve` has already set the umask; another server that runs the bento has not.
        os.umask(0o077)
        give_back_memory()
        connections.bound(raise_descriptor_limit())
        worker = bentoml.server_context.worker_index
        try:
            if (worker or 1) > 1:
                raise TooManyWorkers(
                    "Set BentoML's `workers` to 1: the state of the service is in one process."
                )
            settings = Settings()
            check_server()
            warn_of_unknown_settings()
            connections.drain_seconds = settings.drain_timeout
            # The key is checked first: if it is required and missing, nothing needs to start.
            Authenticator(settings.admin_key, listening_addresses())
            self.components = await compose(settings, edge.end)
            rates = self.components.registry.rates
            guard = Authenticator(
                settings.admin_key,
                listening_addresses(),
                self.components.keyring.get,
                rates.spend if rates is not None else None,
            )
        except Exception as error:
            give_up(error, supervised=worker is not None)
        api = build_api(self.components)
        observe = self.components.metrics.request
        edge.open(api, api.routes, settings=settings, guard=guard, observe=observe)
        self.key_watch = asyncio.create_task(edge.watch())
        # Objects loaded so far live as long as the process, so full collections need not scan them.
        gc.collect()
        gc.freeze()
        # Requests leave no reference cycles. With the defaults, a thousand in flight would be scanned about
        # once a second, and each scan would stall all answers for 0.1 s.
        gc.set_threshold(*_COLLECT_AFTER)
        # A request takes the GIL several times, and each time may wait this long for a computing thread.
        # Python's default is ten times as long.
        sys.setswitchinterval(_SWITCH_SECONDS)
        self.components.monitor.watch_loop()

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """Let running work finish, then close all components."""
        edge.close()
        self.key_watch.cancel()
        await self.components.aclose()

    async def __is_ready__(self) -> bool:
        return self.components.ready and not connections.draining


def application() -> ASGIApp:
    """Return the whole application, health checks and lifespan included, for a server to run."""
    service: Any = Topwork
    app: ASGIApp = service.to_asgi(is_main=True)
    return app


def _stop_supervising(*_: object) -> NoReturn:
    raise SystemExit(1)
