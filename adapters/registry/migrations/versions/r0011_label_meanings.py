"""Descriptions and costs of labels."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Add two columns to adapters; none has descriptions or costs yet."""
    op.add_column("adapters", sa.Column("meanings", sa.Text, nullable=False, server_default="{}"))
    op.add_column("adapters", sa.Column("costs", sa.Text, nullable=False, server_default="{}"))
