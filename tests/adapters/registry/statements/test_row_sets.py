"""Many rows in one step: what comes out is what went in, and SQLite's driver does not go row by row."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Integer,
    MetaData,
    Table,
    Text,
    create_engine,
    event,
    select,
)
from sqlalchemy import update as update_of

from adapters.registry.schema import UtcTime
from adapters.registry.statements.row_sets import all_rows, insert_rows, update_rows

TABLE = Table(
    "packed",
    MetaData(),
    Column("id", Text, primary_key=True),
    Column("count", Integer),
    Column("right", Boolean, nullable=False),
    Column("at", UtcTime, nullable=False),
)
TIMES = [datetime(2026, 1, 2, 3, 4, 5, 678000, UTC), datetime(1970, 1, 1, tzinfo=UTC)]
TEXTS = ["plain", "", "ünï→🙂", 'quotes " and \\ and \n', "[1]", "7", r"\u0000"]


def rows(texts: list[str]) -> list[dict[str, Any]]:
    return [
        {"id": text, "count": None if at % 3 == 0 else at, "right": at % 2 == 0, "at": TIMES[at % 2]}
        for at, text in enumerate(texts)
    ]


@pytest.fixture
def connection(tmp_path: Path) -> Any:
    engine = create_engine(f"sqlite:///{tmp_path / 'packed.db'}")
    with engine.begin() as opened:
        TABLE.create(opened)
        yield opened
    engine.dispose()


def steps(connection: Connection, work: Any) -> tuple[Any, int]:
    """The result of the work, and the number of statements that the driver ran."""
    seen: list[str] = []
    driver = connection.connection.driver_connection
    assert driver is not None
    driver.set_trace_callback(seen.append)
    try:
        return work(), len(seen)
    finally:
        driver.set_trace_callback(None)


@pytest.mark.parametrize("texts", [TEXTS, [*TEXTS, "nul \0 within"]], ids=["plain", "nul"])
def test_rows_come_back_as_they_went_in(connection: Connection, texts: list[str]) -> None:
    wanted = rows(texts)
    insert_rows(connection, TABLE, wanted)
    found = all_rows(connection, select(TABLE).order_by(TABLE.c.id))
    assert [dict(zip(TABLE.c.keys(), row, strict=True)) for row in found] == sorted(
        wanted, key=lambda row: str(row["id"])
    )
    assert [tuple(row) for row in found] == [
        tuple(row) for row in connection.execute(select(TABLE).order_by(TABLE.c.id))
    ]
    assert list(all_rows(connection, select(TABLE).where(TABLE.c.id == "none"))) == []


def test_many_rows_are_few_steps(connection: Connection) -> None:
    many = rows([f"id {number}" for number in range(1_000)])
    _, count = steps(connection, lambda: insert_rows(connection, TABLE, many))
    # The count includes the beginning of the transaction.
    assert count <= 2
    fetched: list[Any] = []
    event.listen(connection, "after_cursor_execute", lambda *arguments: fetched.append(arguments[2]))
    found, count = steps(connection, lambda: all_rows(connection, select(TABLE)))
    assert (len(found), count) == (1_000, 1)
    assert "json_group_array" in fetched[0]


def test_rows_are_changed_at_once(connection: Connection) -> None:
    insert_rows(connection, TABLE, rows([f"id {number}" for number in range(500)]))
    changes = [{"id": f"id {number}", "count": number * 7, "right": True} for number in range(400)]
    columns = (TABLE.c.count, TABLE.c.right)
    _, count = steps(
        connection,
        lambda: update_rows(
            connection, update_of(TABLE).where(TABLE.c.id != "id 3"), TABLE.c.id, columns, changes
        ),
    )
    assert count == 1
    found = {row[0]: row[1:3] for row in connection.execute(select(TABLE))}
    assert found["id 399"] == (399 * 7, True)
    assert found["id 3"] == (None, False)
    assert found["id 401"] == (401, False)


def test_the_work_of_a_change_grows_with_its_rows_and_not_with_their_square(connection: Connection) -> None:
    """Where the key is the second part of the primary key, as in the table of examples."""
    GROUPED.create(connection)
    work = {}
    for count in (200, 2_000):
        written = [{"group": count, "id": f"id {number}", "count": 0} for number in range(count)]
        insert_rows(connection, GROUPED, written)
        changes = [{"id": row["id"], "count": 1} for row in written]
        statement = update_of(GROUPED).where(GROUPED.c.group == count)
        change = partial(update_rows, connection, statement, GROUPED.c.id, [GROUPED.c.count], changes)
        work[count] = instructions(connection, change)
    assert work[2_000] < 20 * work[200]


GROUPED = Table(
    "grouped",
    MetaData(),
    Column("group", Integer, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("count", Integer, nullable=False),
    sqlite_with_rowid=False,
)


def instructions(connection: Connection, work: Callable[[], None]) -> int:
    """The number of SQLite's instructions, in hundreds."""
    passed: list[None] = []
    driver = connection.connection.driver_connection
    assert driver is not None
    driver.set_progress_handler(lambda: passed.append(None), 100)
    try:
        work()
        return len(passed)
    finally:
        driver.set_progress_handler(None, 100)
