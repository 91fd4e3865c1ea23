"""The random name that a database and its store share, compared at every start."""

from __future__ import annotations

from sqlalchemy import Connection, exists, func, or_, select, update

from adapters.registry.database import Database
from adapters.registry.schema import adapters, erasures, identity, tenants
from adapters.registry.statements.queries import current_time
from adapters.storage.artifact import Store
from models.errors import DomainError

_WAY_OUT = (
    "Set TOPWORK_HOME, or TOPWORK_DATABASE_URL and TOPWORK_STORE_URL, to the two that belong together. A new "
    "database needs an empty folder or prefix; a lost one comes back with `topwork restore`."
)


class WrongStore(DomainError):
    """The store belongs to another database."""

    code = "wrong_store"


class Identity:
    """The database's name, and its comparison with the store's. Thread-safe, blocking.

    Every method may raise RegistryUnavailable.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def name(self) -> str:
        """The random name that the database was given when its tables were created."""
        with self._database.reading() as connection:
            return _name(connection)

    @property
    def age(self) -> float:
        """Seconds since the database was given its name."""
        with self._database.reading() as connection:
            since = connection.execute(select(identity.c.created_at)).scalar_one()
            seconds: float = (current_time(connection) - since).total_seconds()
            return seconds

    def check(self, store: Store) -> None:
        """Check that the store belongs to this database; an empty store is claimed.

        A store from a release without names belongs to the database that knows any adapter in it.
        Raises WrongStore, StoreUnavailable.
        """
        mine, theirs = self.name, store.identity()
        if theirs is None:
            if not self._may_claim(store):
                raise WrongStore(
                    f"The store {store.location} holds artifacts, and the database knows none of them. "
                    + _WAY_OUT
                )
            store.claim(mine)
            # Another process may have claimed the store first.
            theirs = store.identity()
        if theirs != mine:
            raise WrongStore(f"The store {store.location} belongs to another database. {_WAY_OUT}")

    def take_over(self, name: str) -> None:
        """Take the name of a lost database, to use its store. No effect if there are tenants or adapters."""
        with self._database.writing() as connection:
            used = select(or_(exists(select(tenants.c.name)), exists(select(adapters.c.uid))))
            if not connection.execute(used).scalar_one():
                connection.execute(update(identity).values(id=name))

    def _may_claim(self, store: Store) -> bool:
        empty = True
        for found in store.objects():
            empty = False
            if self._knows(found.adapter_uid):
                return True
        return empty

    def _knows(self, uid: str) -> bool:
        there = exists(select(adapters.c.uid).where(adapters.c.uid == uid))
        erased = exists(
            select(erasures.c.id).where(
                or_(erasures.c.adapter_uid == uid, func.coalesce(erasures.c.files, "").contains(uid))
            )
        )
        with self._database.reading() as connection:
            return bool(connection.execute(select(or_(there, erased))).scalar_one())


def _name(connection: Connection) -> str:
    name: str = connection.execute(select(identity.c.id)).scalar_one()
    return name
