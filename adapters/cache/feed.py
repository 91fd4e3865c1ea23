"""Hears what other processes change, and tells the caches of this one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from adapters.completion import to_its_end
from adapters.registry.records import Changed
from adapters.registry.registry import Registry
from adapters.registry.statements.changes import News, Position
from adapters.threads import POLL

logger = logging.getLogger("topwork")

_DEAF_SECONDS = 3.0  # without a successful poll


class Listener(Protocol):
    """A cache of what the database holds."""

    def heard(self, change: Changed) -> None:
        """Refresh or drop what the change made old, and what is being read in this moment."""
        ...

    def clear(self) -> None:
        """Drop everything, also what is being read in this moment, because changes may have been missed."""
        ...


def _ignore(tenant: str, name: str | None) -> None:
    """Erase nothing."""


class ChangeFeed:
    """Polls the changes of all processes and tells each to the listeners once. For one event loop.

    They hear of a change `interval` seconds after its commit, or a little later. Those of this process are
    among them.
    """

    def __init__(
        self, registry: Registry, *, interval: float = 0.5, deaf_after: float = _DEAF_SECONDS
    ) -> None:
        """`deaf_after`: seconds without a successful poll after which `hearing` is False."""
        self._registry = registry
        self._interval = interval
        self._deaf_after = deaf_after
        self._listeners: Sequence[Listener] = ()
        self._erased: Callable[[str, str | None], None] = _ignore
        self._position: Position | None = None
        self._heard_at: float | None = None
        self._asked: asyncio.Future[News] | None = None
        self._poller: asyncio.Task[None] | None = None
        self._failing = False

    @property
    def alive(self) -> bool:
        """Whether the changes are being polled."""
        return self._poller is not None and not self._poller.done()

    @property
    def hearing(self) -> bool:
        """Whether the listeners know all changes up to `deaf_after` seconds ago."""
        return self._heard_at is not None and time.monotonic() - self._heard_at < self._deaf_after

    async def start(
        self, listeners: Sequence[Listener], erased: Callable[[str, str | None], None] = _ignore
    ) -> None:
        """Poll for the first time, which clears the listeners, and go on polling in the background.

        `erased(tenant, name)` is called when data of an adapter was erased, by any process; with None as the
        name, all of the tenant's data.
        """
        self._listeners, self._erased = listeners, erased
        await self._try_to_poll()
        self._poller = asyncio.create_task(self._poll_forever(), name="changes")

    async def close(self) -> None:
        """Stop polling; afterwards the feed does not read the database."""
        if self._poller is not None:
            self._poller.cancel()
            with suppress(asyncio.CancelledError):
                await self._poller
            self._poller = None
        # No query may outlive the registry.
        if self._asked is not None:
            await asyncio.gather(self._asked, return_exceptions=True)

    async def poll(self) -> None:
        """Tell the listeners what has changed since the last poll. Raises RegistryUnavailable."""
        began = time.monotonic()
        self._asked = asyncio.ensure_future(POLL.run(self._registry.changed, self._position))
        news = await to_its_end(self._asked)
        if news.missed:
            if self._position is not None:
                logger.warning("changes of other processes may have been missed; the caches are cleared")
            for listener in self._listeners:
                listener.clear()
        for change in news.changes:
            for listener in self._listeners:
                listener.heard(change)
            if change.gone:
                self._erased(change.tenant, change.name or None)
        self._position = news.position
        self._heard_at = began

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self._try_to_poll()

    async def _try_to_poll(self) -> None:
        try:
            await self.poll()
        # Requests are answered from the caches after any error, so polling must continue too.
        except Exception:
            if not self._failing:
                logger.exception(
                    "other processes' commits cannot be read; serving goes on with what is known"
                )
            self._failing = True
        else:
            if self._failing:
                logger.warning("other processes' commits can be read again")
            self._failing = False
