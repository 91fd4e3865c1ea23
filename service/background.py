"""Periodic work in threads, which one of the processes that share the database does for all."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from dataclasses import asdict

from adapters.adaptation.erasure import ErasureSweeper
from adapters.registry.registry import Registry
from adapters.storage.artifact import Store
from adapters.storage.sweeper import SWEPT_AGE, Swept, sweep
from models.errors import DomainError

logger = logging.getLogger("topwork")

# Seconds from one sweep of any process to the next, and after one that failed.
SWEEP_INTERVAL = 3_600.0
RETRY_INTERVAL = 300.0
# Seconds from one look at what is due to the next.
LOOK_INTERVAL = 30.0
CLEAR_INTERVAL = 1.5
# Looks come a little earlier or later, so that no process is always the first.
_JITTER = 0.2


def sweep_artifacts(registry: Registry, store: Store, closing: threading.Event) -> None:
    """Put aside artifacts that a killed process published and never recorded, every hour.

    Returns once `closing` is set.
    """

    def look() -> None:
        with registry.chores.turn("sweep", RETRY_INTERVAL) as turn:
            if turn is not None:
                _sweep(registry, store)
                turn.pause = SWEEP_INTERVAL

    _repeat(look, min(LOOK_INTERVAL, SWEEP_INTERVAL), "sweep put off", closing)


def clear_erasures(registry: Registry, store: Store, rewritten_bytes: int, closing: threading.Event) -> None:
    """Delete remains of erased data, also those written later, until `closing` is set.

    It does not matter which process erased the data. `rewritten_bytes`: see Remains.clear_pages.
    """
    clearing = ErasureSweeper(registry, store, rewritten_bytes)
    _repeat(clearing.clear, CLEAR_INTERVAL, "what is left of erasures is removed later", closing)


def count_totals(registry: Registry, closing: threading.Event) -> None:
    """Count adapters and jobs every minute, until `closing` is set."""
    _repeat(registry.totals.count, LOOK_INTERVAL, "totals are counted later", closing)


def _sweep(registry: Registry, store: Store) -> None:
    # A database no older than the leftovers may be an empty one, used by mistake.
    swept = sweep(store, registry) if registry.identity.age > SWEPT_AGE else Swept()
    if any(asdict(swept).values()):
        logger.info(
            "artifacts without a row: %d put aside, %d deleted after a week; %d have a row again",
            swept.aside,
            swept.deleted,
            swept.brought_back,
        )
    if swept.spared:
        logger.warning(
            "%d more artifacts without a row wait for the next sweeps. Unless killed uploads explain "
            "that, compare TOPWORK_DATABASE_URL and TOPWORK_STORE_URL",
            swept.spared,
        )


def _repeat(look: Callable[[], None], seconds: float, put_off: str, closing: threading.Event) -> None:
    """Look again and again until `closing` is set. No error ends that."""
    while not closing.is_set():
        try:
            look()
        except DomainError as error:
            logger.warning("%s: %s", put_off, error)
        except Exception:
            logger.exception(put_off)
        closing.wait(random.uniform(1.0 - _JITTER, 1.0 + _JITTER) * seconds)
