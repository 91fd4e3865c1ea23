"""The quotas of tenants, and the checks of a change against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Connection, Row, func, select, text

from adapters.registry.database import Database, take_turns
from adapters.registry.schema import adapters, tenants
from models.errors import Conflict


class QuotaExceeded(Conflict):
    """The write would exceed the tenant's quota of adapters or examples."""

    code = "quota_exceeded"


@dataclass(frozen=True, slots=True)
class Quotas:
    """A tenant's limits; None where none is set."""

    requests_per_second: float | None = None  # requests with the tenant's keys
    items_per_second: float | None = None  # inputs and examples in those requests
    bytes_per_second: float | None = None  # bytes of their bodies
    max_adapters: int | None = None
    max_examples: int | None = None  # in all adapters together
    max_running_jobs: int | None = None


@dataclass(frozen=True, slots=True)
class Use:
    """A tenant's use of a rate quota. `seconds`: how long the rate takes to make up for it."""

    tenant: str
    quota: str  # "requests", "items" or "bytes"
    seconds: float


QUOTA_COLUMNS = tuple(tenants.c[field.name] for field in fields(Quotas))


def check_adapters(connection: Connection, tenant: str) -> None:
    """Raise QuotaExceeded if the tenant has max_adapters adapters. Call it in a writing transaction."""
    quotas = _quotas_of(connection, tenant)
    if quotas.max_adapters is None:
        return
    take_turns(connection, f"adapters of {tenant}")
    have = select(func.count()).where(adapters.c.tenant == tenant)
    if connection.execute(have).scalar_one() >= quotas.max_adapters:
        raise QuotaExceeded(
            f"The quota is {quotas.max_adapters} adapters. Delete one, or ask the operator for more."
        )


def check_examples(connection: Connection, tenant: str) -> None:
    """Raise QuotaExceeded if the transaction leaves the tenant with more than max_examples examples."""
    quotas = _quotas_of(connection, tenant)
    if quotas.max_examples is None:
        return
    take_turns(connection, f"examples of {tenant}")
    have = select(func.coalesce(func.sum(adapters.c.examples), 0)).where(adapters.c.tenant == tenant)
    if connection.execute(have).scalar_one() > quotas.max_examples:
        raise QuotaExceeded(
            f"The quota is {quotas.max_examples} examples. Delete some, or ask the operator for more."
        )


def _quotas_of(connection: Connection, tenant: str) -> Quotas:
    row = connection.execute(select(*QUOTA_COLUMNS).where(tenants.c.name == tenant)).one_or_none()
    return Quotas() if row is None else quotas_from(row)


def quotas_from(row: Row[Any]) -> Quotas:
    """Return the quotas in a row with the QUOTA_COLUMNS."""
    return Quotas(**{column.name: getattr(row, column.name) for column in QUOTA_COLUMNS})


# In the order of the key, so that processes that write the same rows do not wait for each other in a circle.
_SPEND = text(
    """INSERT INTO rates (tenant, quota, paid_at)
    SELECT tenants.name, used.quota, clock.now + used.seconds
    FROM unnest(CAST(:tenants AS text[]), CAST(:quotas AS text[]), CAST(:seconds AS float8[]))
            AS used (tenant, quota, seconds)
        JOIN tenants ON tenants.name = used.tenant
        CROSS JOIN (SELECT CAST(extract(epoch FROM now()) AS float8)) AS clock (now)
    ORDER BY tenants.name, used.quota
    ON CONFLICT (tenant, quota) DO UPDATE SET paid_at = excluded.paid_at
        + greatest(0, rates.paid_at - CAST(extract(epoch FROM now()) AS float8))
    RETURNING tenant, quota, paid_at - CAST(extract(epoch FROM now()) AS float8) AS seconds"""
)


class Rates:
    """What tenants have used of their rates in all processes, in PostgreSQL. Thread-safe, blocking."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def spend(self, uses: Sequence[Use]) -> dict[tuple[str, str], float]:
        """Add uses, one for each tenant and quota. Raises RegistryUnavailable.

        Returns the seconds until all uses are made up for, by tenant and quota. Erased tenants are left out.
        """
        values = {
            "tenants": [use.tenant for use in uses],
            "quotas": [use.quota for use in uses],
            "seconds": [use.seconds for use in uses],
        }
        with self._database.writing() as connection:
            rows = connection.execute(_SPEND, values)
            return {(row.tenant, row.quota): row.seconds for row in rows}
