"""Adapters, artifacts, versions, examples, changes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_sorted = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_counter = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
# Milliseconds since 1970 in SQLite, which has no type for times.
_time = sa.DateTime(timezone=True).with_variant(sa.BigInteger(), "sqlite")


def upgrade() -> None:
    """Create the first tables."""
    op.create_table(
        "adapters",
        sa.Column("uid", sa.String(32), primary_key=True),
        sa.Column("tenant", _sorted, nullable=False),
        sa.Column("name", _sorted, nullable=False),
        sa.Column("backbone", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("task", sa.String(16), nullable=False),
        sa.Column("keep_inputs", sa.Boolean, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("next_version", sa.Integer, nullable=False),
        sa.Column("live", sa.Integer),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("examples", sa.Integer, nullable=False),
        sa.Column("created_at", _time, nullable=False),
        sa.UniqueConstraint("tenant", "name", name="adapters_tenant_name"),
    )
    op.create_table(
        "artifacts",
        sa.Column("id", _counter, primary_key=True, autoincrement=True),
        sa.Column(
            "adapter_uid",
            sa.String(32),
            sa.ForeignKey("adapters.uid", name="artifacts_adapter"),
            nullable=False,
        ),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("nonce", sa.String(16), nullable=False),
        sa.Column("length", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("adapter_uid", "sha256", "nonce", name="artifacts_object"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "versions",
        sa.Column(
            "adapter_uid",
            sa.String(32),
            sa.ForeignKey("adapters.uid", name="versions_adapter"),
            nullable=False,
        ),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("method", sa.Text, nullable=False),
        sa.Column("backbone", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column(
            "artifact_id", _counter, sa.ForeignKey("artifacts.id", name="versions_artifact"), nullable=False
        ),
        sa.Column("evidence_id", _counter, sa.ForeignKey("artifacts.id", name="versions_evidence")),
        sa.Column("report", sa.Text, nullable=False),
        sa.Column("labels", sa.Integer, nullable=False),
        sa.Column("created_at", _time, nullable=False),
        sa.PrimaryKeyConstraint("adapter_uid", "number", name="versions_key"),
    )
    op.create_index("versions_by_artifact", "versions", ["artifact_id"])
    op.create_index("versions_by_evidence", "versions", ["evidence_id"])
    op.create_table(
        "examples",
        sa.Column("adapter_uid", sa.String(32), nullable=False),
        sa.Column("id", _sorted, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column(
            "segment_id", _counter, sa.ForeignKey("artifacts.id", name="examples_segment"), nullable=False
        ),
        sa.Column("row", sa.Integer, nullable=False),
        sa.Column("inputs_id", _counter, sa.ForeignKey("artifacts.id", name="examples_inputs")),
        sa.Column("first_revision", sa.BigInteger, nullable=False),
        sa.Column("created_at", _time, nullable=False),
        sa.PrimaryKeyConstraint("adapter_uid", "id", name="examples_key"),
        sa.ForeignKeyConstraint(["adapter_uid"], ["adapters.uid"], name="examples_adapter"),
        sqlite_with_rowid=False,
    )
    op.create_index("examples_by_segment", "examples", ["segment_id"])
    op.create_index("examples_by_inputs", "examples", ["inputs_id"])
    op.create_table(
        "changes",
        sa.Column("epoch", _counter, primary_key=True, autoincrement=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("at", _time, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("changes_by_time", "changes", ["at"])
