"""What a database of many tenants needs: indexes of open jobs, and the checkpoints of fine-tunes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"

_OPEN = sa.text("state IN ('queued', 'running')")
_KEPT = sa.text("checkpoint IS NOT NULL")


def upgrade() -> None:
    """Add a column to the jobs, which have no checkpoint in the store yet, and indexes."""
    op.add_column("jobs", sa.Column("checkpoint", sa.Text))
    op.create_index("jobs_open", "jobs", ["tenant", "state"], sqlite_where=_OPEN, postgresql_where=_OPEN)
    op.create_index("jobs_by_start", "jobs", ["tenant", "started_at"])
    op.create_index("jobs_with_checkpoint", "jobs", ["id"], sqlite_where=_KEPT, postgresql_where=_KEPT)
