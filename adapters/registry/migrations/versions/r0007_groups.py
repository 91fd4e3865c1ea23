"""Groups of examples, which of them are measured on, and what an adapter's answers are to be like."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Add two columns each to two tables; what is there gets what was meant before."""
    op.add_column("examples", sa.Column("group", sa.Text))
    op.add_column("examples", sa.Column("sampled", sa.Boolean, nullable=False, server_default=sa.true()))
    accuracy = sa.Column("answer_accuracy", sa.Float, nullable=False, server_default=sa.text("0.95"))
    op.add_column("adapters", accuracy)
    op.add_column("adapters", sa.Column("weights", sa.String(16), nullable=False, server_default="none"))
