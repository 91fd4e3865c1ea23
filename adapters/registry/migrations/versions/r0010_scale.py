"""What many tenants and processes need: open jobs, checkpoints, common work and rates, erasures' remains."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"

_OPEN = sa.text("state IN ('queued', 'running')")
_KEPT = sa.text("checkpoint IS NOT NULL")
_sorted = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
# Milliseconds since 1970 in SQLite, which has no type for times.
_time = sa.DateTime(timezone=True).with_variant(sa.BigInteger(), "sqlite")

# All tables with rows of tenants, as of this revision.
_TABLES = "replies jobs examples versions artifacts adapters changes keys tenants"


def upgrade() -> None:
    """Create tables, and columns and indexes of others. The jobs have no checkpoint in the store yet."""
    _jobs()
    _chores()
    _erasures()
    _changes()
    _rates()


def _jobs() -> None:
    op.add_column("jobs", sa.Column("checkpoint", sa.Text))
    op.create_index("jobs_open", "jobs", ["tenant", "state"], sqlite_where=_OPEN, postgresql_where=_OPEN)
    op.create_index("jobs_by_start", "jobs", ["tenant", "started_at"])
    op.create_index("jobs_with_checkpoint", "jobs", ["state"], sqlite_where=_KEPT, postgresql_where=_KEPT)


def _chores() -> None:
    op.create_table(
        "chores",
        sa.Column("name", sa.String(16), primary_key=True),
        sa.Column("turn", sa.String(32), nullable=False),
        sa.Column("due_at", _time, nullable=False),
        sa.Column("done_at", _time),
        sa.Column("result", sa.Text),
    )


def _erasures() -> None:
    op.add_column("erasures", sa.Column("files_due_at", _time))
    op.add_column("erasures", sa.Column("pages", sa.Text))
    op.create_index("erasures_by_adapter", "erasures", ["adapter_uid", "at"])
    uncleared = sa.text("pages IS NOT NULL")
    op.create_index(
        "erasures_uncleared", "erasures", ["id"], sqlite_where=uncleared, postgresql_where=uncleared
    )
    # The release before may have ended before it cleared the pages of its last erasures.
    op.execute(f"UPDATE erasures SET pages = '{_TABLES}' WHERE id = (SELECT max(id) FROM erasures)")


def _changes() -> None:
    """Give out the numbers of changes in order, which processes rely on: a connection must not keep any."""
    if op.get_bind().dialect.name == "postgresql":
        sequence = op.get_bind().scalar(sa.text("SELECT pg_get_serial_sequence('changes', 'epoch')"))
        op.execute(f"ALTER SEQUENCE {sequence} CACHE 1")


def _rates() -> None:
    # Without a log in PostgreSQL: it is written often, and may be empty after a crash.
    unlogged = ["UNLOGGED"] if op.get_bind().dialect.name == "postgresql" else []
    op.create_table(
        "rates",
        sa.Column("tenant", _sorted, nullable=False),
        sa.Column("quota", sa.String(16), nullable=False),
        sa.Column("paid_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "quota", name="rates_key"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="rates_tenant", ondelete="CASCADE"),
        prefixes=unlogged,
    )
