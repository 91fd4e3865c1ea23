"""Jobs, and the networks of fine-tuned versions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

# Milliseconds since 1970 in SQLite, which has no type for times.
_time = sa.DateTime(timezone=True).with_variant(sa.BigInteger(), "sqlite")


def upgrade() -> None:
    """Create the table of jobs, and give versions a network."""
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column(
            "adapter_uid", sa.String(32), sa.ForeignKey("adapters.uid", name="jobs_adapter"), nullable=False
        ),
        sa.Column("adapter", sa.Text, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("progress", sa.Text),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("lease_until", _time),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("deadline_at", _time),
        sa.Column("version", sa.Integer),
        sa.Column("error_code", sa.Text),
        sa.Column("error_detail", sa.Text),
        sa.Column("created_at", _time, nullable=False),
        sa.Column("started_at", _time),
        sa.Column("finished_at", _time),
    )
    op.create_index("jobs_by_tenant", "jobs", ["tenant", "id"])
    op.create_index("jobs_by_state", "jobs", ["state", "id"])
    op.create_index("jobs_by_adapter", "jobs", ["adapter_uid"])
    # As SQL, because Alembic would copy the whole table for a column with a constraint in SQLite.
    counter = "INTEGER" if op.get_bind().dialect.name == "sqlite" else "BIGINT"
    constraint = "CONSTRAINT versions_network REFERENCES artifacts (id)"
    op.execute(f"ALTER TABLE versions ADD COLUMN network_id {counter} {constraint}")
    op.create_index("versions_by_network", "versions", ["network_id"])
