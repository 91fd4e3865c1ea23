"""The changes that processes tell each other through the database. Each process hears each change once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Connection,
    Row,
    Select,
    Text,
    cast,
    delete,
    func,
    insert,
    literal,
    null,
    select,
)

from adapters.registry.records import Changed
from adapters.registry.schema import adapters, changes, database_now
from adapters.registry.statements.queries import current_time

CHANGES_KEPT = timedelta(hours=1)
"""How long the database keeps the changes."""
# Some of the changes since an older position may be deleted already.
_OLDEST_POSITION = CHANGES_KEPT - timedelta(minutes=1)
_FORGOTTEN_AT_ONCE = 100  # expired changes deleted by each new one
# With two bounds, PostgreSQL expects few rows and reads the index, also while it has no statistics.
_HIGHEST = 2**63 - 1
_READ_AT_ONCE = 10_000  # after more changes than this, a process clears its caches instead


@dataclass(frozen=True, slots=True)
class Gap:
    """Numbers without a visible change: their transactions have not ended, or were rolled back."""

    first: int
    last: int
    horizon: int  # once all transactions with lower ids have ended, no change of the gap can appear


@dataclass(frozen=True, slots=True)
class Position:
    """How far a process has read the changes."""

    epoch: int  # the highest number seen, 0 if there was none
    at: datetime | None  # time of that change
    read_at: datetime  # by the database's clock
    gaps: tuple[Gap, ...] = ()  # numbers below `epoch` that may still appear


@dataclass(frozen=True, slots=True)
class News:
    """The changes since a position."""

    position: Position  # the new one
    changes: tuple[Changed, ...]
    # Changes may have been missed, so all that was read before may be old. `changes` are the erasures only.
    missed: bool = False


def announce(connection: Connection, tenant: str, name: str, *, gone: bool = False) -> datetime:
    """Record a change for other processes, see the table; return the time.

    The transaction must have written before: it then has its id before it takes a number, which `_read_on`
    relies on.
    """
    now = current_time(connection)
    connection.execute(insert(changes).values(tenant=tenant, name=name, at=now, gone=gone))
    old = (
        select(changes.c.epoch)
        .where(changes.c.at < now - CHANGES_KEPT)
        .limit(_FORGOTTEN_AT_ONCE)
        # Concurrent commits must not wait for each other over rows that both would delete.
        .with_for_update(skip_locked=True)
    )
    connection.execute(delete(changes).where(changes.c.epoch.in_(old)))
    return now


def changes_since(connection: Connection, position: Position | None) -> News:
    """Return the changes since the position, or begin after those of today if there is none."""
    news = None if position is None else _read_on(connection, position)
    return news or _begin(connection, position)


def _read_on(connection: Connection, position: Position) -> News | None:
    """Return the changes since the position, or None if they are not all known.

    Numbers are given out in order, but PostgreSQL's transactions end in any order. A missing number is asked
    for until all transactions that were running when it was first missed have ended.
    """
    rows = _read(connection, _rows(connection).where(changes.c.epoch.between(position.epoch, _HIGHEST)))
    if not rows:
        # Otherwise the database was restored, or is another one.
        return News(position, ()) if not position.epoch else None
    first = rows[0]
    if not _follows(first, position) or len(rows) > _READ_AT_ONCE:
        return None
    epochs = [row.epoch for row in rows]
    late = _late(connection, position.gaps)
    gaps: list[Gap] = []
    if not _serialised(connection):
        oldest, following = int(first.oldest), int(first.following)
        if any(gap.horizon > following for gap in position.gaps):
            return None
        for gap in position.gaps:
            appeared = [row.epoch for row in late if gap.first <= row.epoch <= gap.last]
            if gap.horizon > oldest:
                gaps += _gaps([gap.first - 1, *appeared, gap.last + 1], gap.horizon)
        gaps += _gaps([position.epoch, *epochs], following)
    new = Position(epochs[-1], rows[-1].at, first.now, tuple(gaps))
    return News(new, _merged([*late, *(row for row in rows if row.epoch > position.epoch)]))


def _follows(first: Row[Any], position: Position) -> bool:
    """Return whether the first change from the position on shows that none has been missed."""
    if first.now - position.read_at > _OLDEST_POSITION:
        return False
    if first.epoch == position.epoch:
        return first.at == position.at  # type: ignore[no-any-return]
    # The change of the position is missing because it was deleted for its age, or because of a restore.
    return position.at is None or first.now - position.at > CHANGES_KEPT


def _begin(connection: Connection, lost: Position | None) -> News:
    """Return a position after all visible changes, and the erasures since the lost one."""
    newest = _rows(connection).order_by(changes.c.epoch.desc()).limit(1)
    row = connection.execute(newest).one_or_none()
    if row is None:
        return News(Position(0, None, current_time(connection)), (), missed=True)
    gaps: tuple[Gap, ...] = ()
    if not _serialised(connection):
        previous = func.lag(changes.c.epoch, 1, 0).over(order_by=changes.c.epoch)
        steps = select(previous.label("previous"), changes.c.epoch).subquery()
        holes = select(steps).where(steps.c.epoch > steps.c.previous + 1)
        gaps = tuple(
            gap for pair in connection.execute(holes) for gap in _gaps(tuple(pair), int(row.following))
        )
    erased: list[Row[Any]] = []
    if lost is not None:
        since = _rows(connection).where(changes.c.epoch > lost.epoch, changes.c.gone)
        late = [row for row in _late(connection, lost.gaps) if row.gone]
        erased = [*late, *connection.execute(since.order_by(changes.c.epoch))]
    return News(Position(row.epoch, row.at, row.now, gaps), _merged(erased), missed=True)


def _late(connection: Connection, gaps: Sequence[Gap]) -> Sequence[Row[Any]]:
    """Return the changes in the gaps that have become visible."""
    if not gaps:
        return []
    bounds = func.unnest(
        literal([gap.first for gap in gaps], ARRAY(BigInteger)),
        literal([gap.last for gap in gaps], ARRAY(BigInteger)),
    )
    gap = bounds.table_valued("first", "last").render_derived()
    within = changes.c.epoch.between(gap.c.first, gap.c.last)
    return _read(connection, _rows(connection).join_from(changes, gap, within))


def _rows(connection: Connection) -> Select[Any]:
    """Select changes with their adapters as they are now, and the ids of transactions in the snapshot.

    `oldest`: the lowest id that is still running. `following`: the lowest that was not given out yet.
    """
    bounds: Sequence[ColumnElement[Any]] = (null(), null())
    if not _serialised(connection):
        snapshot = func.pg_current_snapshot()
        bounds = [cast(of(snapshot), Text) for of in (func.pg_snapshot_xmin, func.pg_snapshot_xmax)]
    # Not a join, for which PostgreSQL may read all adapters.
    adapter = select(adapters).where(adapters.c.tenant == changes.c.tenant, adapters.c.name == changes.c.name)
    return select(
        changes,
        adapter.with_only_columns(adapters.c.uid).scalar_subquery().label("uid"),
        adapter.with_only_columns(adapters.c.epoch).scalar_subquery().label("adapter_epoch"),
        database_now().label("now"),
        bounds[0].label("oldest"),
        bounds[1].label("following"),
    )


def _read(connection: Connection, query: Select[Any]) -> Sequence[Row[Any]]:
    return connection.execute(query.order_by(changes.c.epoch).limit(_READ_AT_ONCE + 1)).all()


def _serialised(connection: Connection) -> bool:
    """Return whether changes become visible in the order of their numbers."""
    return connection.dialect.name == "sqlite"


def _gaps(epochs: Sequence[int], horizon: int) -> Iterator[Gap]:
    """Yield the numbers that the ascending epochs leave out."""
    for before, after in pairwise(epochs):
        if after > before + 1:
            yield Gap(before + 1, after - 1, horizon)


def _merged(rows: Sequence[Row[Any]]) -> tuple[Changed, ...]:
    """Return one change for each adapter, or tenant."""
    gone: dict[tuple[str, str], bool] = {}
    states: dict[tuple[str, str], tuple[str | None, int | None]] = {}
    for row in rows:
        place = (row.tenant, row.name)
        gone[place] = gone.get(place, False) or row.gone
        states[place] = (row.uid, row.adapter_epoch)
    return tuple(Changed(*place, *states[place], gone[place]) for place in states)
