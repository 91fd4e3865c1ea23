"""A circuit breaker: while a bucket does not answer, calls to it fail at once instead of waiting."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from adapters.storage.artifact import StoreUnavailable

logger = logging.getLogger("topwork")

_MOST_UNANSWERED = 2  # calls in a row
_PAUSE_SECONDS = 2.0  # between two probes


class Breaker:
    """Opens after two calls in a row without an answer; a probe in the background closes it. Thread-safe.

    `answers`: asks the bucket for something small, and returns whether any answer came.
    """

    def __init__(self, answers: Callable[[], bool], *, pause: float = _PAUSE_SECONDS) -> None:
        self._answers = answers
        self._pause = pause
        self._lock = threading.Lock()
        self._open = False
        self._unanswered = 0
        self._answered_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether calls are refused."""
        return self._open

    def begin(self) -> float:
        """Return the time at which a call begins. Raises StoreUnavailable while the breaker is open."""
        if self._open:
            raise StoreUnavailable("The bucket does not answer. Try again later.")
        return time.monotonic()

    def answered(self) -> None:
        """Count an answer, which may be a refusal."""
        with self._lock:
            self._answered_at = time.monotonic()
            self._unanswered = 0
            closed, self._open = self._open, False
        if closed:
            logger.warning("the bucket answers again")

    def unanswered(self, begun: float) -> None:
        """Count a call that got no answer. `begun`: see `begin`."""
        with self._lock:
            # The bucket has answered a later call, so this one says nothing about it now.
            if begun < self._answered_at:
                return
            self._unanswered += 1
            if self._open or self._unanswered < _MOST_UNANSWERED:
                return
            self._open = True
        logger.warning("the bucket does not answer; calls are refused until it does")
        threading.Thread(target=self._probe, name="bucket-probe", daemon=True).start()

    def _probe(self) -> None:
        while self._open:
            time.sleep(self._pause)
            if self._answers():
                self.answered()
