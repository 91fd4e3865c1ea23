"""Tenants and their keys in SQLite or PostgreSQL. Rows only: service/edge/ decides about access."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal, cast

from sqlalchemy import Connection, Row, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from adapters.registry.database import Database, take_turns
from adapters.registry.erasures import check_not_erased
from adapters.registry.errors import UnknownTenant
from adapters.registry.quotas import QUOTA_COLUMNS, Quotas, quotas_from
from adapters.registry.schema import adapters, database_now, keys, tenants
from adapters.registry.statements.changes import announce
from adapters.registry.statements.queries import current_time
from models.errors import Conflict, NotFound

Scope = Literal["predict", "adapt", "admin"]
"""predict: predictions and embeddings. adapt: examples, jobs, any change to an adapter. admin: keys."""

MAX_KEYS = 100
"""Number of a tenant's keys that may be in use at once."""
SHORTEST_LIFETIME = 60  # seconds
LONGEST_LIFETIME = 3_650 * 86_400  # seconds
# Revoked and expired keys stay listed for at least this long.
_FORGOTTEN_AFTER = timedelta(days=30)
_PREFIX = "tw"
_KEY_ID = re.compile(r"[0-9a-f]{16}")


class TenantExists(Conflict):
    """There already is a tenant of this name."""

    code = "tenant_exists"


class UnknownKey(NotFound):
    """The tenant has no key with this id."""

    code = "unknown_key"

    def __init__(self, key_id: str) -> None:
        super().__init__(f"There is no key {key_id[:16]!r}. GET /tenants/{{tenant}}/keys lists the ids.")


class KeyNotInUse(Conflict):
    """The key was revoked or has expired."""

    code = "key_not_in_use"


class TooManyKeys(Conflict):
    """The tenant has reached MAX_KEYS keys in use."""

    code = "too_many_keys"


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """A tenant, with the numbers of its adapters, of their examples and of its keys in use."""

    name: str
    created_at: datetime
    quotas: Quotas
    adapters: int
    examples: int
    keys: int


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key without its secret."""

    id: str
    tenant: str
    scopes: tuple[Scope, ...]
    note: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class HeldKey:
    """A key as the access check needs it."""

    id: str
    tenant: str
    scopes: frozenset[Scope]
    secret_sha256: str
    in_use_for: float | None  # seconds of validity after it was read: None without end, 0 if not in use
    quotas: Quotas = field(default_factory=Quotas)

    def opens_with(self, secret: str) -> bool:
        """Return whether this is the key's secret, in constant time."""
        return hmac.compare_digest(_digest(secret), self.secret_sha256)


def split_key(key: str) -> tuple[str, str] | None:
    """Return (id, secret) of a key tw_<id>_<secret>, or None if it has another form."""
    prefix, _, rest = key.partition("_")
    key_id, _, secret = rest.partition("_")
    return (key_id, secret) if prefix == _PREFIX and _KEY_ID.fullmatch(key_id) else None


class Tenants:
    """All tenants and their keys. Thread-safe, blocking. Times are by the database's clock.

    Every method may raise RegistryUnavailable.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, name: str) -> TenantRecord:
        """Create a tenant. Raises TenantExists, TenantErased."""
        with self._database.writing() as connection:
            check_not_erased(connection, name, 0.0)
            try:
                connection.execute(insert(tenants).values(name=name, created_at=database_now()))
            except IntegrityError as error:
                raise TenantExists(f"The tenant {name!r} exists already.") from error
            return _tenant(connection, name)

    def tenant(self, name: str) -> TenantRecord:
        """Return one tenant. Raises UnknownTenant."""
        with self._database.reading() as connection:
            return _tenant(connection, name)

    def tenants(self, after: str | None = None, limit: int = 100) -> list[TenantRecord]:
        """Return up to `limit` tenants, ordered by name, after the name `after`."""
        with self._database.reading() as connection:
            query = _counted(current_time(connection)).order_by(tenants.c.name).limit(limit)
            if after is not None:
                query = query.where(tenants.c.name > after)
            return [_tenant_record(row) for row in connection.execute(query)]

    def set_quotas(self, name: str, quotas: Quotas) -> TenantRecord:
        """Replace the tenant's quotas. Nothing that it already has is deleted. Raises UnknownTenant."""
        with self._database.writing() as connection:
            values = asdict(quotas)
            connection.execute(update(tenants).where(tenants.c.name == name).values(values))
            tenant = _tenant(connection, name)
            announce(connection, name, "")
            return tenant

    def create_key(
        self, tenant: str, scopes: Sequence[Scope], *, note: str = "", lifetime: timedelta | None = None
    ) -> tuple[KeyRecord, str]:
        """Create a key; return it and its text, which is not stored. Raises UnknownTenant, TooManyKeys."""
        with self._database.writing() as connection:
            _lock(connection, tenant)
            return _add_key(connection, tenant, scopes, note, lifetime)

    def keys(self, tenant: str) -> list[KeyRecord]:
        """Return the tenant's keys, oldest first. Raises UnknownTenant.

        Revoked and expired keys are kept for a month.
        """
        with self._database.reading() as connection:
            _tenant(connection, tenant)
            query = select(keys).where(keys.c.tenant == tenant).order_by(keys.c.created_at, keys.c.id)
            return [_record(row) for row in connection.execute(query)]

    def revoke(self, tenant: str, key_id: str) -> KeyRecord:
        """Revoke the key at once. Idempotent. Raises UnknownTenant, UnknownKey."""
        with self._database.writing() as connection:
            _lock(connection, tenant)
            record = _key(connection, tenant, key_id)
            if record.revoked_at is not None:
                return record
            connection.execute(update(keys).where(keys.c.id == key_id).values(revoked_at=database_now()))
            announce(connection, tenant, "")
            return _key(connection, tenant, key_id)

    def rotate(self, tenant: str, key_id: str, grace: timedelta) -> tuple[KeyRecord, str]:
        """Create a key with the old one's scopes, note and lifetime. The old one expires in `grace` at most.

        Returns the new key and its text. Raises UnknownTenant, UnknownKey, KeyNotInUse, TooManyKeys.
        """
        with self._database.writing() as connection:
            _lock(connection, tenant)
            old = _key(connection, tenant, key_id)
            now = current_time(connection)
            if old.revoked_at is not None or (old.expires_at is not None and old.expires_at <= now):
                raise KeyNotInUse(f"The key {key_id!r} has expired or was revoked. Create a new one.")
            lifetime = None if old.expires_at is None else old.expires_at - old.created_at
            ends = now + grace if old.expires_at is None else min(old.expires_at, now + grace)
            connection.execute(update(keys).where(keys.c.id == key_id).values(expires_at=ends))
            announce(connection, tenant, "")
            return _add_key(connection, tenant, old.scopes, old.note, lifetime)

    def find(self, key_id: str) -> HeldKey | None:
        """Return the key with this id, of any tenant, or None."""
        with self._database.reading() as connection:
            query = select(keys, *QUOTA_COLUMNS).join(tenants, keys.c.tenant == tenants.c.name)
            row = connection.execute(query.where(keys.c.id == key_id)).one_or_none()
            if row is None:
                return None
            record = _record(row)
            left = None
            if record.expires_at is not None:
                left = max(0.0, (record.expires_at - current_time(connection)).total_seconds())
            if record.revoked_at is not None:
                left = 0.0
            return HeldKey(
                record.id, record.tenant, frozenset(record.scopes), row.secret_sha256, left, quotas_from(row)
            )


def _digest(secret: str) -> str:
    # A secret has 256 random bits, too many to guess, so a slow hash would only slow down its owner.
    return hashlib.sha256(secret.encode()).hexdigest()


def _in_use(now: datetime) -> Any:
    return keys.c.revoked_at.is_(None) & or_(keys.c.expires_at.is_(None), keys.c.expires_at > now)


def _counted(now: datetime) -> Any:
    own = adapters.c.tenant == tenants.c.name
    keys_of = select(func.count()).where(keys.c.tenant == tenants.c.name, _in_use(now))
    return select(
        tenants,
        select(func.count()).where(own).scalar_subquery().label("adapters"),
        select(func.coalesce(func.sum(adapters.c.examples), 0))
        .where(own)
        .scalar_subquery()
        .label("examples"),
        keys_of.scalar_subquery().label("keys"),
    )


def _tenant_record(row: Row[Any]) -> TenantRecord:
    return TenantRecord(row.name, row.created_at, quotas_from(row), row.adapters, int(row.examples), row.keys)


def _tenant(connection: Connection, name: str) -> TenantRecord:
    query = _counted(current_time(connection)).where(tenants.c.name == name)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise UnknownTenant(name)
    return _tenant_record(row)


def _lock(connection: Connection, tenant: str) -> None:
    """Lock the tenant's keys: concurrent writers would both see room for one. Raises UnknownTenant."""
    take_turns(connection, f"keys of {tenant}")
    _tenant(connection, tenant)


def _key(connection: Connection, tenant: str, key_id: str) -> KeyRecord:
    query = select(keys).where(keys.c.tenant == tenant, keys.c.id == key_id)
    row = connection.execute(query).one_or_none() if _KEY_ID.fullmatch(key_id) else None
    if row is None:
        raise UnknownKey(key_id)
    return _record(row)


def _add_key(
    connection: Connection, tenant: str, scopes: Sequence[Scope], note: str, lifetime: timedelta | None
) -> tuple[KeyRecord, str]:
    now = current_time(connection)
    of_tenant = keys.c.tenant == tenant
    gone = or_(keys.c.revoked_at < now - _FORGOTTEN_AFTER, keys.c.expires_at < now - _FORGOTTEN_AFTER)
    connection.execute(delete(keys).where(of_tenant, gone))
    if connection.execute(select(func.count()).where(of_tenant, _in_use(now))).scalar_one() >= MAX_KEYS:
        raise TooManyKeys(f"A tenant has at most {MAX_KEYS} keys in use. Revoke one.")
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    values = {
        "id": key_id,
        "tenant": tenant,
        "secret_sha256": _digest(secret),
        "scopes": " ".join(sorted(set(scopes))),
        "note": note,
        "created_at": now,
        "expires_at": None if lifetime is None else now + lifetime,
    }
    connection.execute(insert(keys).values(values))
    return _key(connection, tenant, key_id), f"{_PREFIX}_{key_id}_{secret}"


def _record(row: Row[Any]) -> KeyRecord:
    return KeyRecord(
        id=row.id,
        tenant=row.tenant,
        scopes=cast(tuple[Scope, ...], tuple(row.scopes.split())),
        note=row.note,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
