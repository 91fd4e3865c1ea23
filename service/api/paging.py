"""Pagination of lists: the cursor and the page size."""

from __future__ import annotations

import base64
from typing import Annotated

from fastapi import Depends, Query

from service.errors import Problem


async def behind(cursor: Annotated[str | None, Query(max_length=2_048)] = None) -> str | None:
    """Return the item after which the page begins. Raises a 422 Problem for an invalid cursor."""
    return None if cursor is None else _last_of(cursor)


def _last_of(cursor: str) -> str:
    try:
        last = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
    except ValueError:
        last = "\0"
    # No valid cursor contains a NUL, and PostgreSQL rejects it.
    if "\0" in last:
        raise Problem(422, "invalid_cursor", "Send the cursor that the last page named as `next`.")
    return last


Behind = Annotated[str | None, Depends(behind)]
Limit = Annotated[int, Query(ge=1, le=1_000)]
