"""Examples that are set aside, and rollbacks by hand that hold."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

# Milliseconds since 1970 in SQLite, which has no type for times.
_time = sa.DateTime(timezone=True).with_variant(sa.BigInteger(), "sqlite")


def upgrade() -> None:
    """Add a column each to two tables; of what is there, nothing is set aside or held."""
    op.add_column("examples", sa.Column("excluded_since", sa.BigInteger))
    op.add_column("adapters", sa.Column("rolled_back_at", _time))
