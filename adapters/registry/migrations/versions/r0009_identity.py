"""The database's identity, by which its store is known."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

# Milliseconds since 1970 in SQLite, which has no type for times.
_time = sa.DateTime(timezone=True).with_variant(sa.BigInteger(), "sqlite")


def upgrade() -> None:
    """Add a table with one row: a random name, and since when the database has it."""
    identity = op.create_table(
        "identity",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("created_at", _time, nullable=False),
    )
    now = datetime.now(UTC)
    sqlite = op.get_bind().dialect.name == "sqlite"
    op.bulk_insert(
        identity, [{"id": uuid.uuid4().hex, "created_at": int(now.timestamp() * 1000) if sqlite else now}]
    )
