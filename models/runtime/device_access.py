"""Who may use the GPU of this process: many at once, or one alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class DeviceAccess:
    """A lock on the device, shared or exclusive; exclusive requests go before later shared ones.

    While a graph is captured in one thread, CUDA forbids all others to allocate or copy memory.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0
        self._alone = False
        self._waiting = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Use the device concurrently with other shared users. Not reentrant."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Use the device exclusively: wait for the current users and hold off new ones."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._alone and not self._users)
            self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


DEVICE = DeviceAccess()
"""Access to this process's GPU."""
