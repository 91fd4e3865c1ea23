"""The registry's tables, and their differences between SQLite and PostgreSQL."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
    true,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import TypeDecorator, TypeEngine

from adapters.examples.target import ANSWER_ACCURACY, Target

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


class UtcTime(TypeDecorator[datetime]):
    """Aware UTC datetimes: timestamptz in PostgreSQL, milliseconds since 1970 in SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return the column type of the database."""
        return BigInteger() if dialect.name == "sqlite" else DateTime(timezone=True)

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        """Convert a Python value for the database."""
        if value is None or dialect.name != "sqlite":
            return value
        return (value - _EPOCH) // _MILLISECOND

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Convert a database value for Python."""
        if value is None:
            return None
        if dialect.name == "sqlite":
            return datetime.fromtimestamp(value / 1000, UTC)
        moment: datetime = value
        return moment.astimezone(UTC)


class JsonText(TypeDecorator[dict[str, Any]]):
    """A JSON object as text, with its keys in the order in which they were given."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: dict[str, Any] | None, dialect: Dialect) -> Any:
        """Convert a Python value for the database."""
        return None if value is None else json.dumps(value, ensure_ascii=False)

    def process_result_value(self, value: Any, dialect: Dialect) -> dict[str, Any] | None:
        """Convert a database value for Python."""
        return None if value is None else json.loads(value)


class database_now(FunctionElement[datetime]):  # noqa: N801 - reads as the SQL function that it is
    """The database's clock at the time of the statement, so that several hosts agree on order and age."""

    type = UtcTime()
    inherit_cache = True


@compiles(database_now, "postgresql")
def _postgresql_now(element: database_now, compiler: Any, **options: Any) -> str:
    return "clock_timestamp()"


@compiles(database_now, "sqlite")
def _sqlite_now(element: database_now, compiler: Any, **options: Any) -> str:
    return "CAST(ROUND((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER)"


# Text that sorts by code point in both databases, regardless of the PostgreSQL cluster's locale.
Sorted = Text().with_variant(Text(collation="C"), "postgresql")
# Auto-incremented integer. SQLite numbers rows only in a column that is declared INTEGER.
Counter = BigInteger().with_variant(Integer(), "sqlite")

metadata = MetaData()

# A quota is not set where its column is NULL.
tenants = Table(
    "tenants",
    metadata,
    Column("name", Sorted, primary_key=True),
    Column("created_at", UtcTime, nullable=False),
    Column("requests_per_second", Float),
    Column("items_per_second", Float),
    Column("bytes_per_second", Float),
    Column("max_adapters", BigInteger),
    Column("max_examples", BigInteger),
    Column("max_running_jobs", BigInteger),
)

# Only the digest of a secret is stored. `scopes` is a space-separated list.
keys = Table(
    "keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("tenant", Sorted, ForeignKey("tenants.name", name="keys_tenant"), nullable=False),
    Column("secret_sha256", String(64), nullable=False),
    Column("scopes", Text, nullable=False),
    Column("note", Text, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime),
    Column("revoked_at", UtcTime),
    Index("keys_by_tenant", "tenant", "id"),
)

adapters = Table(
    "adapters",
    metadata,
    Column("uid", String(32), primary_key=True),
    Column("tenant", Sorted, nullable=False),
    Column("name", Sorted, nullable=False),
    Column("backbone", Text, nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("task", String(16), nullable=False),
    Column("keep_inputs", Boolean, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("next_version", Integer, nullable=False),
    Column("live", Integer),
    Column("epoch", BigInteger, nullable=False),
    Column("examples", Integer, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("answer_accuracy", Float, nullable=False, server_default=text(str(ANSWER_ACCURACY))),
    Column("weights", String(16), nullable=False, server_default="none"),
    # When a person made an older version live. Newer ones are withheld until a person lifts the rollback.
    Column("rolled_back_at", UtcTime),
    # When a person last restored a version.
    Column("restored_at", UtcTime),
    # Descriptions and costs of labels.
    Column("meanings", JsonText, nullable=False, server_default="{}"),
    Column("costs", JsonText, nullable=False, server_default="{}"),
    UniqueConstraint("tenant", "name", name="adapters_tenant_name"),
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("id", Counter, primary_key=True, autoincrement=True),
    Column("adapter_uid", String(32), ForeignKey("adapters.uid", name="artifacts_adapter"), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("nonce", String(16), nullable=False),
    Column("length", BigInteger, nullable=False),
    UniqueConstraint("adapter_uid", "sha256", "nonce", name="artifacts_object"),
    sqlite_autoincrement=True,
)

versions = Table(
    "versions",
    metadata,
    Column("adapter_uid", String(32), ForeignKey("adapters.uid", name="versions_adapter"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("method", Text, nullable=False),
    Column("backbone", Text, nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("artifact_id", Counter, ForeignKey("artifacts.id", name="versions_artifact"), nullable=False),
    Column("evidence_id", Counter, ForeignKey("artifacts.id", name="versions_evidence")),
    Column("network_id", Counter, ForeignKey("artifacts.id", name="versions_network")),
    Column("report", Text, nullable=False),
    Column("labels", Integer, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    PrimaryKeyConstraint("adapter_uid", "number", name="versions_key"),
    Index("versions_by_artifact", "artifact_id"),
    Index("versions_by_evidence", "evidence_id"),
    Index("versions_by_network", "network_id"),
)

examples = Table(
    "examples",
    metadata,
    Column("adapter_uid", String(32), nullable=False),
    Column("id", Sorted, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("target", Text, nullable=False),
    Column("segment_id", Counter, ForeignKey("artifacts.id", name="examples_segment"), nullable=False),
    Column("row", Integer, nullable=False),
    Column("inputs_id", Counter, ForeignKey("artifacts.id", name="examples_inputs")),
    # The first revision with this id. Versions fitted since then may have learned from the example.
    Column("first_revision", BigInteger, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    # The tenant's name for examples that belong together, or NULL.
    Column("group", Text),
    # False if the example was chosen for being wrong or hard: it is learned from, but not measured on.
    Column("sampled", Boolean, nullable=False, server_default=true()),
    # The revision that set the example aside. Versions fitted since then have not learned from it.
    Column("excluded_since", BigInteger),
    PrimaryKeyConstraint("adapter_uid", "id", name="examples_key"),
    ForeignKeyConstraint(["adapter_uid"], ["adapters.uid"], name="examples_adapter"),
    Index("examples_by_segment", "segment_id"),
    Index("examples_by_inputs", "inputs_id"),
    Index("examples_by_digest", "digest"),
    sqlite_with_rowid=False,
)

_OPEN = "state IN ('queued', 'running')"
_WITH_CHECKPOINT = "checkpoint IS NOT NULL"

# Ids sort by submission time. `attempt` is a fencing token: a worker with an older one can write nothing.
jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("adapter_uid", String(32), ForeignKey("adapters.uid", name="jobs_adapter"), nullable=False),
    Column("adapter", Text, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("request", Text, nullable=False),
    Column("progress", Text),
    Column("attempt", Integer, nullable=False),
    Column("lease_until", UtcTime),
    Column("cancel_requested", Boolean, nullable=False),
    Column("deadline_at", UtcTime),
    Column("version", Integer),
    Column("error_code", Text),
    Column("error_detail", Text),
    Column("created_at", UtcTime, nullable=False),
    Column("started_at", UtcTime),
    Column("finished_at", UtcTime),
    Column("released", Integer, nullable=False, server_default="0"),
    # A fine-tune's newest checkpoint in the store, as a JSON list: sha256, length, nonce.
    Column("checkpoint", Text),
    Index("jobs_by_tenant", "tenant", "id"),
    Index("jobs_by_state", "state", "id"),
    Index("jobs_by_adapter", "adapter_uid"),
    Index("jobs_by_start", "tenant", "started_at"),
    # A tenant may have a thousand ended jobs for each open one.
    Index("jobs_open", "tenant", "state", sqlite_where=text(_OPEN), postgresql_where=text(_OPEN)),
    Index(
        "jobs_with_checkpoint",
        "state",
        sqlite_where=text(_WITH_CHECKPOINT),
        postgresql_where=text(_WITH_CHECKPOINT),
    ),
)

# Changes of the last hour: to an adapter; without a name, to the tenant's keys or quotas; also without a
# tenant, to those of all. `epoch` only numbers the rows. `gone`: something was erased.
changes = Table(
    "changes",
    metadata,
    Column("epoch", Counter, primary_key=True, autoincrement=True),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("at", UtcTime, nullable=False),
    Column("gone", Boolean, nullable=False, server_default=false()),
    Index("changes_by_time", "at"),
    sqlite_autoincrement=True,
)

_WITH_FILES = "files IS NOT NULL"
_WITH_PAGES = "pages IS NOT NULL"

# Erasures of a tenant, an adapter or examples of it, so that older backups can be restored without them.
# `examples`: digests of their ids, "*" for all. `files`: uids of adapters whose files may still exist.
# `pages`: tables whose pages may still hold bytes of the erased rows.
erasures = Table(
    "erasures",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", Sorted, nullable=False),
    Column("adapter_uid", String(32)),
    Column("examples", Text),
    Column("files", Text),
    Column("receipt", Text, nullable=False),
    Column("at", UtcTime, nullable=False),
    # When a process is to delete the files again. NULL: at once.
    Column("files_due_at", UtcTime),
    Column("pages", Text),
    Index("erasures_by_tenant", "tenant", "at"),
    Index("erasures_by_adapter", "adapter_uid", "at"),
    Index("erasures_unfinished", "at", sqlite_where=text(_WITH_FILES), postgresql_where=text(_WITH_FILES)),
    Index("erasures_uncleared", "id", sqlite_where=text(_WITH_PAGES), postgresql_where=text(_WITH_PAGES)),
)

# Replies to requests with an Idempotency-Key, written in the transaction that makes the request's change.
replies = Table(
    "replies",
    metadata,
    Column("tenant", Sorted, nullable=False),
    Column("key_sha256", String(64), nullable=False),
    Column("request_sha256", String(64), nullable=False),
    Column("adapter_uid", String(32), nullable=False),
    Column("status", Integer, nullable=False),
    Column("body", Text, nullable=False),
    Column("at", UtcTime, nullable=False),
    PrimaryKeyConstraint("tenant", "key_sha256", name="replies_key"),
    Index("replies_by_adapter", "adapter_uid"),
    Index("replies_by_time", "at"),
)

# A single row. The store holds the same id, see adapters/registry/identity.py.
identity = Table(
    "identity",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("created_at", UtcTime, nullable=False),
)

# Work that one of all processes does for all of them, see adapters/registry/upkeep/chores.py.
chores = Table(
    "chores",
    metadata,
    Column("name", String(16), primary_key=True),
    # The turn that began last.
    Column("turn", String(32), nullable=False),
    # When the next turn may begin. While a turn lasts, its process puts this off again and again.
    Column("due_at", UtcTime, nullable=False),
    # The end of the last turn that succeeded, and what it found.
    Column("done_at", UtcTime),
    Column("result", Text),
)

# Recent use of each quota by tenant, summed over all processes. Processes on SQLite do not use the table.
rates = Table(
    "rates",
    metadata,
    Column(
        "tenant", Sorted, ForeignKey("tenants.name", name="rates_tenant", ondelete="CASCADE"), nullable=False
    ),
    Column("quota", String(16), nullable=False),
    # When the quota's rate has made up for all that was used, in seconds since 1970.
    Column("paid_at", Float, nullable=False),
    PrimaryKeyConstraint("tenant", "quota", name="rates_key"),
)


def encode_target(target: Target) -> str:
    """Return a target as JSON: a string, a list of strings, or a number that decodes to the same float."""
    return json.dumps(list(target) if isinstance(target, tuple) else target, allow_nan=False)


def decode_target(text: str) -> Target:
    """Return the target that `encode_target` encoded."""
    value = json.loads(text)
    if isinstance(value, list):
        return tuple(value)
    return value if isinstance(value, str) else float(value)
