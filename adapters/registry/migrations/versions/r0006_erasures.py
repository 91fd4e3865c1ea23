"""What was erased, what was answered under an Idempotency-Key, and changes that took something away."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

# Milliseconds since 1970 in SQLite, which has no type for times.
_time = sa.DateTime(timezone=True).with_variant(sa.BigInteger(), "sqlite")
_sorted = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Create two tables, and a column of a third."""
    op.add_column("changes", sa.Column("gone", sa.Boolean, nullable=False, server_default=sa.false()))
    op.create_table(
        "erasures",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", _sorted, nullable=False),
        sa.Column("adapter_uid", sa.String(32)),
        sa.Column("examples", sa.Text),
        sa.Column("files", sa.Text),
        sa.Column("receipt", sa.Text, nullable=False),
        sa.Column("at", _time, nullable=False),
    )
    op.create_index("erasures_by_tenant", "erasures", ["tenant", "at"])
    unfinished = sa.text("files IS NOT NULL")
    op.create_index(
        "erasures_unfinished", "erasures", ["at"], sqlite_where=unfinished, postgresql_where=unfinished
    )
    op.create_table(
        "replies",
        sa.Column("tenant", _sorted, nullable=False),
        sa.Column("key_sha256", sa.String(64), nullable=False),
        sa.Column("request_sha256", sa.String(64), nullable=False),
        sa.Column("adapter_uid", sa.String(32), nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("at", _time, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "key_sha256", name="replies_key"),
    )
    op.create_index("replies_by_adapter", "replies", ["adapter_uid"])
    op.create_index("replies_by_time", "replies", ["at"])
