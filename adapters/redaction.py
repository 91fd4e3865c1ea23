"""Recognises error messages that would show a caller files, SQL statements or code."""

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
    """Whether the text contains a file path, an SQL statement, a connection URL or a stack trace."""
    return _INSIDE.search(text) is not None
