"""Pages of a list, and the cursor that leads from one page to the next."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import Field

from service.errors import Problem

R = TypeVar("R")

Next = Annotated[
    str | None,
    Field(
        description="Send it as `cursor` for the next page. null: this page is the last.",
        examples=["bWFpbHM"],
    ),
]


@dataclass(frozen=True, slots=True)
class PageQuery:
    """The part of a list that a request asks for."""

    after: str | None  # the last entry of the page before; None for the first page
    limit: int  # the most entries of a page

    @property
    def wanted(self) -> int:
        """The number of records to read: one more than a page shows tells whether there is a next one."""
        return self.limit + 1

    def cut(self, records: Sequence[R], key: Callable[[R], str]) -> tuple[Sequence[R], str | None]:
        """Return the records of the page, and the cursor of the next page or None.

        `key`: the name or id of a record, by which the list is ordered.
        """
        shown = records[: self.limit]
        return shown, encode_cursor(key(shown[-1])) if len(records) > self.limit else None


def encode_cursor(last: str) -> str:
    """Return an opaque cursor for the entries after a name or an id."""
    return base64.urlsafe_b64encode(last.encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> str:
    """Return the name or id that a cursor was made of. Raises a 422 Problem for anything else."""
    try:
        last = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
    except ValueError:
        last = "\0"
    # No valid cursor contains a NUL, and PostgreSQL rejects it.
    if "\0" in last:
        raise Problem(422, "invalid_cursor", "`cursor` is not valid. Send the `next` of the last page.")
    return last
