"""Refusals of databases that cannot be used, which stay unchanged."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from adapters.registry.database import Database, DatabaseUnusable
from adapters.registry.errors import RegistryTooNew, RegistryTooOld, RegistryUnavailable
from adapters.registry.migrations import HEAD
from adapters.registry.registry import Registry
from service.server.process import explain
from tests.support.adapters.schema import LAST, at_revision


def made(path: Path) -> None:
    registry = Registry(f"sqlite:///{path}")
    registry.migrate()
    registry.tenants.create("acme")
    registry.close()


def used(path: Path) -> None:
    registry = Registry(f"sqlite:///{path}")
    try:
        registry.check_pages()
        registry.migrate()
        registry.tenants.tenants()
    finally:
        registry.close()


def without_header(path: Path) -> None:
    path.write_bytes(b"not this" + path.read_bytes()[8:])


def without_pages(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for start in range(4096, len(data), 4096):
        data[start : start + 200] = os.urandom(200)
    path.write_bytes(data)


def without_a_table(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE keys")
        connection.execute("DROP TABLE tenants")
    connection.close()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_header, "is no SQLite file"),
        (without_pages, "is damaged"),
        (without_a_table, "lacks a part of its tables"),
        (a_folder, "cannot be opened"),
    ],
)
def test_a_broken_file_is_named_with_the_way_out(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "topwork.db"
    made(path)
    damage(path)
    with pytest.raises(DatabaseUnusable) as caught:
        used(path)
    said = explain(caught.value)
    assert words in said
    assert str(path) in said
    assert "restore" in said or "TOPWORK_DATABASE_URL" in said
    assert len(said.splitlines()) == 1


def test_rewriting_a_locked_file_is_unavailable(tmp_path: Path) -> None:
    """Also the statements that bypass SQLAlchemy raise an error of the registry."""
    path = tmp_path / "topwork.db"
    made(path)
    registry = Registry(f"sqlite:///{path}", patience=0.1)
    registry.tenants.tenants()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA journal_mode = delete")
    other.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(RegistryUnavailable, match="does not answer"):
            registry.remains.clear_pages()
    finally:
        other.close()
        registry.close()


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path / 'typo' / 'topwork.db'}")
    with pytest.raises(DatabaseUnusable, match="cannot be opened"):
        registry.migrate()
    registry.close()
    assert list(tmp_path.iterdir()) == []


def test_what_another_host_is_asked_for_is_said() -> None:
    registry = Registry("postgresql+psycopg://user:secret@127.0.0.1:1/none", patience=1.0)
    with pytest.raises(RegistryUnavailable, match="does not answer") as caught:
        registry.migrate()
    registry.close()
    said = explain(caught.value)
    assert "127.0.0.1" in said
    assert "secret" not in said


def test_tables_of_an_earlier_release_are_left_alone(registry_url: str) -> None:
    at_revision(registry_url, LAST)
    database = Database(registry_url)
    with pytest.raises(RegistryTooOld, match="topwork migrate"):
        database.require_current()
    assert database.revision == LAST
    database.migrate()
    database.require_current()
    assert database.revision == HEAD
    database.close()


def test_a_database_without_tables_gets_none(registry_url: str, tmp_path: Path) -> None:
    database = Database(registry_url)
    with pytest.raises(RegistryTooOld, match="yet"):
        database.require_current()
    database.close()
    assert list(tmp_path.glob("*.db")) == []


def test_tables_of_a_later_release_are_refused(registry_url: str) -> None:
    database = Database(registry_url)
    database.migrate()
    with database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(RegistryTooNew):
        database.require_current()
    database.close()
