"""Keys of an ASGI scope by which the server and the edge tell each other of a request, and its id."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

if TYPE_CHECKING:
    pass


def new_id() -> str:
    """The id of a request: random, so that ids tell nothing of how many requests there are. Thread-safe."""
    try:
        return _drawn.pop()
    except IndexError:
        digits = os.urandom(_DRAWN_AT_ONCE * _ID_DIGITS // 2).hex()
        starts = range(_ID_DIGITS, len(digits), _ID_DIGITS)
        _drawn.extend([digits[start : start + _ID_DIGITS] for start in starts])
        return digits[:_ID_DIGITS]


# How a server tells that a caller has hung up: in the scope's extensions, the set of what it calls then. A
# server without one is asked, by a task for each request.
GONE = "topwork.gone"


# What the server puts beside it for a body that comes too slowly: why it waits no longer. It wakes who reads.
SLOW = "topwork.slow"


# What says there that the body has a time of its own.
UNHURRIED = "topwork.unhurried"


# Ids drawn from the system's generator and not given yet: to ask it for each one takes three times as long.
_drawn: list[str] = []


_DRAWN_AT_ONCE = 256


_ID_DIGITS = 32
