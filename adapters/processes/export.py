"""Exports of backbones that this host lacks, in a process of their own: only an export imports torch."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Sequence

from adapters.processes.child import child_environment
from models.errors import DomainError
from models.store.exports import find

logger = logging.getLogger("topwork")

_CHECK_SECONDS = 0.2  # between calls of `check`


class ExportFailed(DomainError):
    """A backbone could not be exported."""

    code = "export_failed"


async def ensure_exported(names: Sequence[str], check: Callable[[], object] = lambda: None) -> None:
    """Export the backbones that are missing. The export ends if this is cancelled or `check` raises.

    Raises ExportFailed.
    """
    missing = [name for name in names if find(name) is None]
    if not missing:
        return
    logger.info("exporting %s: once, about a minute", ", ".join(missing))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "models.export", *missing, env=child_environment()
    )
    ended = asyncio.create_task(process.wait())
    try:
        while not (await asyncio.wait([ended], timeout=_CHECK_SECONDS))[0]:
            check()
    finally:
        if process.returncode is None:
            process.terminate()
            await ended
    if process.returncode:
        raise ExportFailed(f"Exporting {', '.join(missing)} failed; the lines above say why.")
