"""Periodic work in threads, which removes what erasures and killed processes leave behind."""

from __future__ import annotations

import logging
import threading
from dataclasses import asdict

from adapters.adaptation.erasure import ErasureSweeper
from adapters.registry.registry import Registry
from adapters.storage.artifact import Store
from adapters.storage.sweeper import SWEPT_AGE, Swept, sweep
from models.errors import DomainError

logger = logging.getLogger("topwork")

SWEEP_INTERVAL = 3_600.0  # seconds
CLEAR_INTERVAL = 1.5  # seconds


def sweep_artifacts(registry: Registry, store: Store, closing: threading.Event) -> None:
    """Put aside artifacts that a killed process published and never recorded, now and every hour.

    Returns once `closing` is set.
    """
    while not closing.is_set():
        try:
            # A database no older than the leftovers may be an empty one, used by mistake.
            swept = sweep(store, registry) if registry.identity.age > SWEPT_AGE else Swept()
        except DomainError as error:
            logger.warning("sweep put off: %s", error)
        except Exception:
            # No error may end the sweeps.
            logger.exception("sweep put off")
        else:
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
        closing.wait(SWEEP_INTERVAL)


def clear_erasures(registry: Registry, store: Store, closing: threading.Event) -> None:
    """Delete remains of erased data, also those written later, until `closing` is set.

    It does not matter which process erased the data.
    """
    clearing = ErasureSweeper(registry, store)
    while not closing.wait(CLEAR_INTERVAL):
        try:
            clearing.clear()
        except DomainError as error:
            logger.warning("what is left of erasures is removed later: %s", error)
        except Exception:
            logger.exception("what is left of erasures is removed later")
