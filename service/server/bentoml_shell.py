"""BentoML's application with our edge in front, and the other internals of BentoML that are used."""

from __future__ import annotations

from typing import Any, ClassVar

import bentoml
import uvicorn
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS

from adapters.logs import configure_logging
from service.environment import tracing_wanted
from service.server.drain import DrainingServer
from service.server.overrides import check_overrides
from service.server.protocol import BoundedHttpProtocol
from service.settings import Settings

_HEALTH_CHECKS = frozenset({"/livez", "/readyz", "/healthz"})


class HealthSplit:
    """Sends requests to our edge, bypassing BentoML's middlewares and routes, which take four times as long.

    BentoML itself only handles the lifespan and the health checks.
    """

    def __init__(self, app: ASGIApp, edge: ASGIApp) -> None:
        self._app = app
        self._edge = edge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ours = scope["type"] != "lifespan" and scope["path"] not in _HEALTH_CHECKS
        await (self._edge if ours else self._app)(scope, receive, send)


class BentoShell(bentoml.Service[Any]):  # type: ignore[misc]
    """BentoML's application behind our edge, without the middlewares that the edge replaces."""

    edge: ClassVar[Any]

    def to_asgi(self, is_main: bool = True) -> Starlette:
        """Return BentoML's application: its health checks and lifespan, and our edge for every other path."""
        check_overrides()
        # BentoML has set its own format up by now.
        configure_logging(Settings().log_format, batched=["topwork.access"])
        # Every launcher, `bentoml serve` included, lets uvicorn choose the HTTP protocol.
        HTTP_PROTOCOLS["auto"] = f"{BoundedHttpProtocol.__module__}:{BoundedHttpProtocol.__name__}"
        # Launchers look this class up after `to_asgi`.
        uvicorn.Server = DrainingServer  # type: ignore[misc]
        app: Starlette = super().to_asgi(is_main=is_main)
        # Tracing moves outside the edge, to cover all requests. TimeoutMiddleware is dropped: it has its own
        # error format, and keeps a timer for each request until the timeout, even if it has been answered.
        layers: dict[Any, Any] = {layer.cls: layer for layer in app.user_middleware}
        tracing = layers.pop(OpenTelemetryMiddleware, None)
        layers.pop(TimeoutMiddleware, None)
        app.user_middleware = list(layers.values())
        build = app.build_middleware_stack

        def build_behind_front() -> ASGIApp:
            front: ASGIApp = HealthSplit(build(), self.edge)
            if tracing is not None and tracing_wanted():
                front = tracing.cls(front, *tracing.args, **tracing.kwargs)
            return front

        app.build_middleware_stack = build_behind_front  # type: ignore[method-assign]
        return app


def shell_around(edge: ASGIApp) -> type[BentoShell]:
    """Return the class of a BentoML service whose requests go to `edge`."""
    return type("Shell", (BentoShell,), {"edge": edge})


def stop_tracking() -> None:
    """Have BentoML read again whether it may send usage statistics, which it has cached."""
    from bentoml._internal.utils.analytics.usage_stats import do_not_track

    do_not_track.cache_clear()


def configured_host() -> str:
    """Return the address that BentoML's own configuration names."""
    from bentoml._internal.configuration.containers import BentoMLContainer

    return str(BentoMLContainer.http.host.get())
