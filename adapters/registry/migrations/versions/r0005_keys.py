"""Tenants, with a row for each that has an adapter, their quotas and their keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

# Milliseconds since 1970 in SQLite, which has no type for times.
_time = sa.DateTime(timezone=True).with_variant(sa.BigInteger(), "sqlite")
_sorted = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Create the two tables."""
    op.create_table(
        "tenants",
        sa.Column("name", _sorted, primary_key=True),
        sa.Column("created_at", _time, nullable=False),
        sa.Column("requests_per_second", sa.Float),
        sa.Column("items_per_second", sa.Float),
        sa.Column("bytes_per_second", sa.Float),
        sa.Column("max_adapters", sa.BigInteger),
        sa.Column("max_examples", sa.BigInteger),
        sa.Column("max_running_jobs", sa.BigInteger),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("tenant", _sorted, sa.ForeignKey("tenants.name", name="keys_tenant"), nullable=False),
        sa.Column("secret_sha256", sa.String(64), nullable=False),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("created_at", _time, nullable=False),
        sa.Column("expires_at", _time),
        sa.Column("revoked_at", _time),
    )
    op.create_index("keys_by_tenant", "keys", ["tenant", "id"])
    op.execute(
        "INSERT INTO tenants (name, created_at) SELECT tenant, MIN(created_at) FROM adapters GROUP BY tenant"
    )
