"""Work that ends although whoever asked for it has gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any, TypeVar

logger = logging.getLogger("topwork")

T = TypeVar("T")


async def to_its_end(work: Awaitable[T]) -> T:
    """What the work gives. It goes on when the caller is cancelled.

    What it raises then is logged if it is a fault, and else nobody's any more: that an adapter is unknown is
    the answer to a request whose client has left.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_nobody_waits)
        raise


def _nobody_waits(task: asyncio.Future[Any]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None and not hasattr(error, "code"):
        logger.error("what went on after its client had left has failed", exc_info=error)
