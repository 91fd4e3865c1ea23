"""What a failure may tell a caller: nothing of files, statements and code."""

from __future__ import annotations

import re

_ROOTS = (
    "app|bentoml|bin|boot|data|dev|etc|home|lib|media|mnt|opt|private|proc|root|run|srv|sys|tmp|usr|Users|var"
)
_INSIDE = re.compile(
    r"Traceback \(most recent|\bFile \"|site-packages|\w\.py\b"
    rf"|(?<![\w.~-])/(?:{_ROOTS})/|/\.topwork\b"
    r"|\[SQL|\[parameters|\b(?:SELECT|INSERT INTO|UPDATE|DELETE FROM|CREATE|ALTER|DROP|PRAGMA)\s+[\w*\"(]"
    r"|\b(?:sqlalchemy|sqlite3|psycopg)\.|\b(?:sqlite|postgresql|s3|gs|az|file)(?:\+\w+)?://"
)


def leaks_internals(text: str) -> bool:
    """Whether a file's path, a statement of SQL, an address with a password or a stack is in the text."""
    return _INSIDE.search(text) is not None
