"""Examples that are set aside, rollbacks by hand that hold, and when a version was restored."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

# Milliseconds since 1970 in SQLite, which has no type for times.
_time = sa.DateTime(timezone=True).with_variant(sa.BigInteger(), "sqlite")


def upgrade() -> None:
    """Add columns to two tables; of what is there, nothing is set aside or held."""
    op.add_column("examples", sa.Column("excluded_since", sa.BigInteger))
    op.add_column("adapters", sa.Column("rolled_back_at", _time))
    op.add_column("adapters", sa.Column("restored_at", _time))
