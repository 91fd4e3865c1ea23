"""The quotas of tenants, and the checks of a change against them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Connection, Row, func, select

from adapters.registry.database import take_turns
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
