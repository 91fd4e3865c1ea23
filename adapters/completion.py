"""Runs work to its end even if the client that asked for it disconnects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any, TypeVar

logger = logging.getLogger("topwork")

T = TypeVar("T")


async def to_its_end(work: Awaitable[T]) -> T:
    """Return the result of `work`, which continues if the caller is cancelled.

    An error raised after that is logged, unless it has a `code`: such an error is an answer to the client,
    and the client is gone.
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
        logger.error("work that continued after its client had disconnected has failed", exc_info=error)
