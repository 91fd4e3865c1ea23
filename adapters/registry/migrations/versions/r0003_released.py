"""How many of a job's attempts were released, and count for nothing."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column; its default lets processes of the release before go on submitting."""
    op.add_column("jobs", sa.Column("released", sa.Integer, nullable=False, server_default="0"))
