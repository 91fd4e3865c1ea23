"""Keys of the ASGI scope that the server and the edge share, and the ids of requests."""

from __future__ import annotations

import os

# Key in the scope's extensions: the set of callbacks that the server calls when the client has hung up. A
# server without it is polled, by a task for each request.
GONE = "topwork.gone"
# Key in the extensions: why the server rejects a body as too slow. The server sets it and wakes the reader.
SLOW = "topwork.slow"
# Key in the extensions: the body has time limits of its own, so the server's do not apply.
UNHURRIED = "topwork.unhurried"
# Unused ids, drawn in batches from the system's generator: drawing each one alone takes three times as long.
_drawn: list[str] = []
_DRAWN_AT_ONCE = 256
_ID_DIGITS = 32


def new_id() -> str:
    """Return a request id, random so that ids do not reveal the number of requests. Thread-safe."""
    try:
        return _drawn.pop()
    except IndexError:
        digits = os.urandom(_DRAWN_AT_ONCE * _ID_DIGITS // 2).hex()
        starts = range(_ID_DIGITS, len(digits), _ID_DIGITS)
        _drawn.extend([digits[start : start + _ID_DIGITS] for start in starts])
        return digits[:_ID_DIGITS]
