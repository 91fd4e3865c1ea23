"""The requests that are running, and why they may be cancelled: deadlines, revoked keys, erased tenants."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from service.edge.channel import channel_of
from service.errors import Problem

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from service.edge.auth import Authenticator
    from service.edge.channel import RequestChannel

logger = logging.getLogger("topwork")

_KEY_CHECK_SECONDS = 1.0  # between checks that the keys of running requests are still in use
# Deadlines are checked periodically, since a timer for each request costs more and rarely fires. So a request
# may end late, by a share of its timeout and at most by _LATE_SECONDS.
_LATE_SHARE = 0.1
_LATE_SECONDS = 0.25


class RunningRequests:
    """Cancels running requests. For one event loop. `timeout`: seconds that a request may take."""

    def __init__(self, guard: Authenticator, timeout: float) -> None:
        self.timeout = timeout
        self._guard = guard
        self._running: set[RequestChannel] = set()
        self._pause = min(_LATE_SECONDS, _LATE_SHARE * timeout)
        self._timer: asyncio.TimerHandle | None = None

    def add(self, channel: RequestChannel) -> None:
        """Watch a request until it is removed."""
        self._running.add(channel)
        self._schedule()

    def remove(self, channel: RequestChannel) -> None:
        """Stop watching a request."""
        self._running.discard(channel)

    def end(self, tenant: str, why: Exception) -> None:
        """Cancel the tenant's requests and answer them with `why`; requests that manage tenants go on."""
        for channel in list(self._running):
            if channel.tenant == tenant and not channel.access.is_about_tenants:
                channel.end(why)

    async def watch_keys(self) -> None:
        """Cancel requests whose key was revoked or has expired, in a loop that runs until it is cancelled."""
        while True:
            await asyncio.sleep(_KEY_CHECK_SECONDS)
            try:
                await self._check_keys()
            except Exception:
                # No error may end the watch.
                logger.exception("the keys of running requests cannot be checked")

    async def _check_keys(self) -> None:
        for channel in list(self._running):
            if channel.access.is_about_tenants:
                continue
            refusal = await self._guard.check(channel.caller)
            # The request may have been answered during the check.
            if refusal is not None and channel in self._running:
                channel.end(refusal)

    def _schedule(self) -> None:
        if self._timer is None and self._running:
            self._timer = asyncio.get_running_loop().call_later(self._pause, self._end_late)

    def _end_late(self) -> None:
        """Cancel requests past their deadline; schedule the next check while requests are running."""
        now = time.monotonic()
        for channel in list(self._running):
            if channel.until <= now:
                channel.end(Problem(504, "deadline_exceeded", channel.TOO_LONG.format(self.timeout)))
        self._timer = None
        self._schedule()


class Deadlines:
    """Runs each request so that it can be cancelled, at its deadline or for another reason."""

    def __init__(self, app: ASGIApp, running: RunningRequests) -> None:
        self._app = app
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        channel = channel_of(scope)
        self._running.add(channel)
        try:
            await channel.answer(self._app, scope, self._running.timeout)
        finally:
            self._running.remove(channel)
