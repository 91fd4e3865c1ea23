"""Changes are heard once each, in any order of commits, or a process knows that it missed some."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection, delete, func, insert, select, text, update

from adapters.registry.quotas import Quotas
from adapters.registry.registry import Registry
from adapters.registry.schema import changes, database_now, tenants
from adapters.registry.statements import changes as statements
from adapters.registry.statements.changes import CHANGES_KEPT, News, Position, announce
from tests.support.adapters.records import append, create, refit


class Process:
    """What a process hears, poll by poll."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.position: Position | None = None
        assert self.poll().missed

    def poll(self) -> News:
        news = self.registry.changed(self.position)
        self.position = news.position
        return news

    def hears(self) -> list[tuple[str, str]]:
        news = self.poll()
        assert not news.missed
        return [(change.tenant, change.name) for change in news.changes]

    @property
    def gaps(self) -> int:
        assert self.position is not None
        return sum(gap.last - gap.first + 1 for gap in self.position.gaps)


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[Registry]:
    registry = Registry(postgres_url)
    registry.migrate()
    yield registry
    registry.close()


@pytest.fixture
def open_transactions() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def announced(registry: Registry, stack: ExitStack, tenant: str) -> Connection:
    """A transaction that has announced a change, and has not ended."""
    connection = stack.enter_context(registry._database._engine.connect())
    connection.execute(insert(tenants).values(name=tenant, created_at=database_now()))
    announce(connection, tenant, "")
    return connection


def numbers(registry: Registry) -> list[int]:
    with registry._database.reading() as connection:
        return list(connection.scalars(select(changes.c.epoch).order_by(changes.c.epoch)))


def test_a_change_is_heard_once_with_the_adapter_as_it_is_now(registry: Registry) -> None:
    process = Process(registry)
    assert process.hears() == []
    first = append(registry, create(registry).adapter, "c").adapter
    other = create(registry, "other").adapter
    found = {change.name: (change.uid, change.epoch, change.gone) for change in process.poll().changes}
    assert found == {"pets": (first.uid, first.epoch, False), "other": (other.uid, other.epoch, False)}
    assert process.hears() == []
    registry.delete_adapter("acme", "pets")
    assert [(c.name, c.uid, c.epoch, c.gone) for c in process.poll().changes] == [("pets", None, None, True)]
    assert process.hears() == []
    assert Process(registry).hears() == []


def test_keys_and_quotas_are_heard_as_changes_of_the_tenant(registry: Registry) -> None:
    registry.tenants.create("acme")
    key, _ = registry.tenants.create_key("acme", ["predict"])
    process = Process(registry)
    registry.tenants.create_key("acme", ["predict"])
    assert process.hears() == []
    registry.tenants.rotate("acme", key.id, timedelta(0))
    assert process.hears() == [("acme", "")]
    registry.tenants.revoke("acme", key.id)
    assert process.hears() == [("acme", "")]
    registry.tenants.revoke("acme", key.id)
    assert process.hears() == []
    registry.tenants.set_quotas("acme", Quotas(requests_per_second=1.0))
    assert process.hears() == [("acme", "")]
    registry.erasures.tenant("acme")
    assert [(change.tenant, change.name, change.gone) for change in process.poll().changes] == [
        ("acme", "", True)
    ]


def test_a_commit_that_comes_late_is_heard(postgres: Registry, open_transactions: ExitStack) -> None:
    process = Process(postgres)
    first, second, third = (announced(postgres, open_transactions, name) for name in ("a", "b", "c"))
    third.commit()
    assert process.hears() == [("c", "")]
    assert process.gaps == 2
    second.commit()
    assert process.hears() == [("b", "")]
    assert process.hears() == []
    first.commit()
    assert process.hears() == [("a", "")]
    assert process.hears() == []
    assert process.gaps == 0


def test_a_commit_under_way_when_a_process_starts_is_heard(
    postgres: Registry, open_transactions: ExitStack
) -> None:
    create(postgres)
    early = announced(postgres, open_transactions, "early")
    create(postgres, "other")
    process = Process(postgres)
    assert process.hears() == []
    early.commit()
    assert process.hears() == [("early", "")]
    assert process.gaps == 0


def test_numbers_that_were_rolled_back_are_not_asked_for_long(
    postgres: Registry, open_transactions: ExitStack
) -> None:
    process = Process(postgres)
    rolled_back, slow, last = (announced(postgres, open_transactions, name) for name in ("a", "b", "c"))
    last.commit()
    assert process.hears() == [("c", "")]
    rolled_back.rollback()
    # What a transaction of the time might still show is asked for, however long that takes.
    for name in ("d", "e"):
        postgres.tenants.create(name)
        postgres.tenants.set_quotas(name, Quotas())
        assert process.hears() == [(name, "")]
    assert process.gaps == 2
    slow.commit()
    assert process.hears() == [("b", "")]
    assert process.gaps == 0


def test_numbers_that_are_left_out_cost_nothing(postgres: Registry) -> None:
    """PostgreSQL leaves out up to 32 after a crash, and a restore as many as it likes."""
    process = Process(postgres)
    create(postgres)
    with postgres._database.writing() as connection:
        sequence = func.pg_get_serial_sequence("changes", "epoch")
        connection.execute(select(func.setval(sequence, 3_000_000_000)))
    create(postgres, "other")
    assert process.hears() == [("acme", "pets"), ("acme", "other")]
    assert process.position is not None
    assert len(process.position.gaps) == 1
    assert process.hears() == []
    assert process.gaps == 0


def test_a_restored_database_is_noticed(registry: Registry) -> None:
    """Rows and numbers of the last minute are gone, and the numbers are given out again."""
    for name in ("a", "b", "c"):
        create(registry, name)
    process = Process(registry)
    kept = numbers(registry)[:1]
    with registry._database.writing() as connection:
        connection.execute(delete(changes).where(changes.c.epoch.not_in(kept)))
    assert process.poll().missed
    assert process.hears() == []
    refit(registry, registry.adapter("acme", "a"))
    assert process.hears() == [("acme", "a")]
    # This time, others have committed so much that the numbers are beyond those that were seen.
    highest = numbers(registry)[-1]
    with registry._database.writing() as connection:
        connection.execute(delete(changes).where(changes.c.epoch == highest))
        for number in (highest, highest + 1):
            values = {"epoch": number, "tenant": "acme", "name": "b", "at": database_now(), "gone": False}
            connection.execute(insert(changes).values(values))
    assert process.poll().missed
    assert process.hears() == []


def test_a_copy_of_the_file_from_before_is_noticed(tmp_path: Path) -> None:
    """An operator puts back an older SQLite file. Its processes open it anew."""
    url = f"sqlite:///{tmp_path / 'topwork.db'}"
    with ExitStack() as stack:
        registry = Registry(url)
        stack.callback(registry.close)
        registry.migrate()
        create(registry)
        registry._database.copy_to(tmp_path / "before.db")
        append(registry, registry.adapter("acme", "pets"), "c")
        process = Process(registry)
        registry.close()
        shutil.copy(tmp_path / "before.db", tmp_path / "topwork.db")
        for name in ("topwork.db-wal", "topwork.db-shm"):
            (tmp_path / name).unlink(missing_ok=True)
        process.registry = Registry(url)
        stack.callback(process.registry.close)
        assert process.poll().missed
        assert process.hears() == []


def test_another_cluster_is_noticed(postgres: Registry, open_transactions: ExitStack) -> None:
    """The same rows, in a cluster that has run fewer transactions."""
    process = Process(postgres)
    first, second = (announced(postgres, open_transactions, name) for name in ("a", "b"))
    second.commit()
    assert process.hears() == [("b", "")]
    assert process.position is not None
    ahead = tuple(replace(gap, horizon=gap.horizon + 10**12) for gap in process.position.gaps)
    process.position = replace(process.position, gaps=ahead)
    assert process.poll().missed
    assert process.hears() == []
    first.commit()
    assert process.hears() == [("a", "")]


def test_who_was_away_for_long_hears_the_erasures_that_are_left(registry: Registry) -> None:
    process = Process(registry)
    create(registry)
    create(registry, "other")
    registry.delete_adapter("acme", "other")
    assert process.position is not None
    process.position = replace(process.position, read_at=process.position.read_at - CHANGES_KEPT)
    news = process.poll()
    assert news.missed
    assert [(change.name, change.gone) for change in news.changes] == [("other", True)]
    assert process.hears() == []


def test_more_changes_than_can_be_told_are_missed(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statements, "_READ_AT_ONCE", 5)
    process = Process(registry)
    adapter = create(registry).adapter
    for _ in range(4):
        adapter = refit(registry, adapter).adapter
    assert process.hears() == [("acme", "pets")]
    for _ in range(6):
        adapter = refit(registry, adapter).adapter
    assert process.poll().missed
    assert process.hears() == []


def test_a_quiet_hour_is_nothing_missed(registry: Registry) -> None:
    """The change that was seen last is deleted for its age by the next one."""
    adapter = create(registry).adapter
    hour_ago = CHANGES_KEPT + timedelta(minutes=1)
    with registry._database.writing() as connection:
        at = connection.execute(select(changes.c.at)).scalar_one() - hour_ago
        connection.execute(update(changes).values(at=at))
    process = Process(registry)
    refit(registry, adapter)
    assert len(numbers(registry)) == 1
    assert process.hears() == [("acme", "pets")]


def test_a_process_of_the_release_before_passes_over_changes_of_keys(registry: Registry) -> None:
    """It looks up the adapter of the change's name, which no adapter can have, unless something is gone."""
    registry.tenants.create("acme")
    process = Process(registry)
    registry.tenants.set_quotas("acme", Quotas())
    (change,) = process.poll().changes
    assert (change.name, change.uid, change.gone) == ("", None, False)
    with registry._database.reading() as connection:
        assert connection.execute(text("SELECT name, gone FROM changes")).one() == ("", False)
