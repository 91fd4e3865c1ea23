"""An index by which a tenant's adapters find inputs that another of them has embedded."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the index."""
    op.create_index("examples_by_digest", "examples", ["digest"])
