"""A database and a store together, and what can be done to them from outside."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import obstore
import pytest
from sqlalchemy import select

from adapters.maintenance.doctor import Doctor, Open
from adapters.maintenance.inspection import Finding
from adapters.maintenance.table_copy import TABLES
from adapters.registry.database import Database
from adapters.registry.schema import adapters
from adapters.storage.artifact import Artifact, Store
from adapters.storage.bucket import BucketStore
from adapters.storage.open import open_store
from models.backbone import Backbone
from tests.support.adapters.adapter_stack import TENANT, World, taught, world
from tests.support.storage import new_bucket, new_schema

Where = Literal["local", "shared"]
WHERE: tuple[Where, ...] = ("local", "shared")


def nothing(name: str) -> Backbone | None:
    """No backbone is exported."""
    return None


@dataclass
class Place:
    """SQLite with a folder, or PostgreSQL with a bucket."""

    folder: Path
    url: str
    store: Store
    database: Database

    def world(self) -> AbstractAsyncContextManager[World]:
        """A process that serves from here."""
        return world(self.folder, url=self.url, store=self.store)

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """All rows by table."""
        with self.database.reading() as connection:
            return {
                table.name: [dict(row._mapping) for row in connection.execute(select(table))]
                for table in TABLES
            }

    def examine(self, open_backbone: Open = nothing, **options: Any) -> list[Finding]:
        """The doctor's findings."""
        return list(Doctor(self.database, self.store, open_backbone, **options).findings())

    def overwrite(self, artifact: Artifact, data: bytes | None) -> None:
        """Other bytes, or none, in the place of an artifact's, as a failing disk might have it."""
        (found,) = [one for one in self.store.objects() if one.name == artifact.name]
        key = f"{found.tenant}/{found.adapter_uid}/{found.name}"
        if data is None:
            self.store.discard([found])
        elif isinstance(self.store, BucketStore):
            obstore.put(self.store._bucket, key, data)
        else:
            (self.folder / "artifacts" / key).write_bytes(data)

    def flip(self, artifact: Artifact) -> None:
        """One bit of an artifact's bytes is another."""
        (found,) = [one for one in self.store.objects() if one.name == artifact.name]
        data = bytearray(self.store.read(found.tenant, found.adapter_uid, artifact))
        data[len(data) // 2] ^= 1
        self.overwrite(artifact, bytes(data))

    def contents(self) -> bytes:
        """The bytes of all stored objects, one after the other."""
        keys = [f"{one.tenant}/{one.adapter_uid}/{one.name}" for one in self.store.objects()]
        if isinstance(self.store, BucketStore):
            return b"".join(bytes(obstore.get(self.store._bucket, key).bytes()) for key in keys)
        return b"".join((self.folder / "artifacts" / key).read_bytes() for key in keys)

    def uid(self, name: str) -> str:
        """The uid of the adapter of that name."""
        with self.database.reading() as connection:
            query = select(adapters.c.uid).where(adapters.c.name == name)
            return str(connection.execute(query).scalar_one())


Make = Callable[[Where, str], Place]


def make_places(request: pytest.FixtureRequest, folder: Path) -> tuple[Make, list[Place]]:
    """A maker of empty places, and the list of those made, to be closed."""
    made: list[Place] = []

    def make(where: Where, name: str) -> Place:
        home = folder / name
        home.mkdir()
        if where == "local":
            url, store = f"sqlite:///{home / 'registry.db'}", open_store(str(home / "artifacts"))
        else:
            options = request.getfixturevalue("s3_options")
            url = new_schema(request.getfixturevalue("postgres_server"))
            store = open_store(new_bucket(options), options)
        database = Database(url)
        database.migrate()
        made.append(Place(home, url, store, database))
        return made[-1]

    return make, made


async def churn(world: World, turned: asyncio.Event, stop: asyncio.Event) -> None:
    """Adapts, removes and deletes, one after the other, until told to stop; tells of each round."""
    number = 0
    while not stop.is_set():
        name = f"busy{number % 3}"
        await world.adapt(taught(2 + number % 3), name)
        await world.editor.remove(TENANT, name, ["one0"])
        if number % 3 == 2:
            for one in range(3):
                await world.eraser.adapter(TENANT, f"busy{one}")
        number += 1
        turned.set()
