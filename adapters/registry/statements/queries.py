"""Queries that return records, for both the registry's reads and its commits."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, Row, Select, literal, select

from adapters.examples.target import Target
from adapters.registry.errors import UnknownAdapter, UnknownExample, UnknownVersion
from adapters.registry.records import AdapterRecord, Alias, ExampleRecord, VersionRecord
from adapters.registry.schema import adapters, artifacts, database_now, decode_target, examples, versions
from adapters.registry.statements.row_sets import all_rows
from adapters.storage.artifact import Artifact

T = TypeVar("T")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# Parameters of one statement. The limit of PostgreSQL is 65,535, that of SQLite 32,766.
_PARAMETERS = 10_000

_ADAPTER = (
    adapters.c.uid,
    adapters.c.tenant,
    adapters.c.name,
    adapters.c.backbone,
    adapters.c.fingerprint,
    adapters.c.kind,
    adapters.c.task,
    adapters.c.keep_inputs,
    adapters.c.revision,
    adapters.c.live,
    adapters.c.epoch,
    adapters.c.examples,
    adapters.c.created_at,
    adapters.c.answer_accuracy,
    adapters.c.weights,
    adapters.c.rolled_back_at,
    adapters.c.restored_at,
    adapters.c.meanings,
    adapters.c.costs,
)
_head = artifacts.alias("head")
_evidence = artifacts.alias("evidence")
_network = artifacts.alias("network")


class Used(NamedTuple):
    """The revisions in which an example was in use."""

    first: int
    until: int | None  # the revision that set it aside, exclusive; None if it is still in use

    def taught(self, revision: int) -> bool:
        """Return whether a version fitted on that revision may have learned from the example."""
        return self.first <= revision and (self.until is None or revision < self.until)


def chunks(values: Iterable[T], size: int = _PARAMETERS) -> Iterator[list[T]]:
    """Split the values into lists that fit the parameters of one statement."""
    everything = list(values)
    for start in range(0, len(everything), size):
        yield everything[start : start + size]


def current_time(connection: Connection) -> datetime:
    """Return the time by the database's clock."""
    return connection.execute(select(database_now())).scalar_one()


def microseconds(moment: datetime) -> int:
    """Return the microseconds from 1970 to the moment."""
    return (moment - _EPOCH) // _MICROSECOND


def select_adapter(*, meanings: bool = True) -> Select[Any]:
    """Return the query whose rows `adapter_record` takes. `meanings`: False leaves them empty."""
    if meanings:
        return select(*_ADAPTER)
    empty = literal({}, adapters.c.meanings.type)
    return select(*(empty if column is adapters.c.meanings else column for column in _ADAPTER))


def adapter_record(row: Row[Any]) -> AdapterRecord:
    """Return the record of a row of `select_adapter`."""
    return AdapterRecord(*tuple(row))


def adapter_by_uid(connection: Connection, uid: str, *, lock: bool = False) -> AdapterRecord:
    """Return the adapter; `lock`: lock its row until the transaction ends. Raises UnknownAdapter."""
    query = select_adapter().where(adapters.c.uid == uid)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise UnknownAdapter(uid)
    return adapter_record(row)


def adapter_by_name(connection: Connection, tenant: str, name: str, *, lock: bool = False) -> AdapterRecord:
    """Return the adapter; `lock`: lock its row until the transaction ends. Raises UnknownAdapter."""
    query = select_adapter().where(adapters.c.tenant == tenant, adapters.c.name == name)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise UnknownAdapter(name)
    return adapter_record(row)


def artifacts_by_id(connection: Connection, *uids: str) -> dict[int, Artifact]:
    """Return the artifacts that the adapters' rows refer to, by row id."""
    query = select(artifacts.c.id, artifacts.c.sha256, artifacts.c.length, artifacts.c.nonce)
    rows = connection.execute(query.where(artifacts.c.adapter_uid.in_(uids)))
    return {number: Artifact(sha256, length, nonce) for number, sha256, length, nonce in rows}


def example_records(
    connection: Connection, uid: str, narrow: Callable[[Select[Any]], Select[Any]] = lambda query: query
) -> list[ExampleRecord]:
    """Return examples ordered by id; `narrow` restricts the query."""
    query = narrow(
        select(
            examples.c.id,
            examples.c.digest,
            examples.c.target,
            examples.c.segment_id,
            examples.c.row,
            examples.c.inputs_id,
            examples.c.created_at,
            examples.c.group,
            examples.c.sampled,
            examples.c.excluded_since.is_not(None),
        )
        .where(examples.c.adapter_uid == uid)
        .order_by(examples.c.id)
    )
    rows = all_rows(connection, query)
    stored = _artifacts_of({number for row in rows for number in (row[3], row[5])}, connection, uid)
    return [
        ExampleRecord(name, digest, _target(target), stored[segment], place, stored.get(inputs), *more)
        for name, digest, target, segment, place, inputs, *more in rows
    ]


def example_record(connection: Connection, uid: str, example_id: str) -> ExampleRecord:
    """Return one example. Raises UnknownExample."""
    found = example_records(connection, uid, lambda query: query.where(examples.c.id == example_id))
    if not found:
        raise UnknownExample(example_id)
    return found[0]


def places_of(
    connection: Connection, tenant: str, fingerprint: str, digests: Iterable[str]
) -> dict[str, tuple[str, Artifact, int]]:
    """Locate the tenant's embeddings by this backbone: adapter uid, segment and row by input digest."""
    query = (
        select(
            examples.c.digest,
            examples.c.adapter_uid,
            artifacts.c.sha256,
            artifacts.c.length,
            artifacts.c.nonce,
            examples.c.row,
        )
        .join(adapters, adapters.c.uid == examples.c.adapter_uid)
        .join(artifacts, artifacts.c.id == examples.c.segment_id)
        .where(adapters.c.tenant == tenant, adapters.c.fingerprint == fingerprint)
    )
    found = {}
    for some in chunks(digests):
        for digest, uid, *artifact, row in all_rows(connection, query.where(examples.c.digest.in_(some))):
            found[digest] = (uid, Artifact(*artifact), row)
    return found


def version_records(connection: Connection, uid: str, number: int | None = None) -> list[VersionRecord]:
    """Return the kept versions, newest first; only `number` if given."""
    query = (
        select(
            versions.c.number,
            versions.c.revision,
            versions.c.method,
            versions.c.backbone,
            versions.c.fingerprint,
            _head.c.sha256,
            _head.c.length,
            _head.c.nonce,
            _evidence.c.sha256,
            _evidence.c.length,
            _evidence.c.nonce,
            _network.c.sha256,
            _network.c.length,
            _network.c.nonce,
            versions.c.report,
            versions.c.labels,
            versions.c.created_at,
        )
        .join(_head, _head.c.id == versions.c.artifact_id)
        .join(_evidence, _evidence.c.id == versions.c.evidence_id, isouter=True)
        .join(_network, _network.c.id == versions.c.network_id, isouter=True)
        .where(versions.c.adapter_uid == uid)
        .order_by(versions.c.number.desc())
    )
    if number is not None:
        query = query.where(versions.c.number == number)
    return [_version_record(row) for row in connection.execute(query)]


def versions_without(connection: Connection, uid: str, ids: Collection[str]) -> list[VersionRecord]:
    """Return the versions that have learned from none of these examples, newest first."""
    columns = examples.c.first_revision, examples.c.excluded_since
    used = {
        Used(*row)
        for chunk in chunks(ids)
        for row in connection.execute(
            select(*columns).where(examples.c.adapter_uid == uid, examples.c.id.in_(chunk))
        )
    }
    every = version_records(connection, uid)
    return [version for version in every if not any(one.taught(version.revision) for one in used)]


def version_record(connection: Connection, uid: str, number: int) -> VersionRecord:
    """Return one version. Raises UnknownVersion."""
    found = version_records(connection, uid, number)
    if not found:
        raise UnknownVersion(number)
    return found[0]


def alias_of(connection: Connection, adapter: AdapterRecord, number: int | None = None) -> Alias:
    """Return the alias of the version, by default of the live one. Raises UnknownVersion."""
    wanted = adapter.live if number is None else number
    version = None if wanted is None else version_record(connection, adapter.uid, wanted)
    return Alias(
        uid=adapter.uid,
        tenant=adapter.tenant,
        name=adapter.name,
        backbone=version.backbone if version else adapter.backbone,
        fingerprint=version.fingerprint if version else adapter.fingerprint,
        kind=adapter.kind,
        task=adapter.task,
        version=version.number if version else None,
        artifact=version.artifact if version else None,
        evidence=version.evidence if version else None,
        network=version.network if version else None,
        epoch=adapter.epoch,
    )


def _version_record(row: Sequence[Any]) -> VersionRecord:
    number, revision, method, backbone, fingerprint, *stored, report, labels, created_at = row
    head, evidence, network = stored[:3], stored[3:6], stored[6:]
    return VersionRecord(
        number=number,
        revision=revision,
        method=method,
        backbone=backbone,
        fingerprint=fingerprint,
        artifact=Artifact(*head),
        evidence=None if evidence[0] is None else Artifact(*evidence),
        network=None if network[0] is None else Artifact(*network),
        report=json.loads(report),
        labels=labels,
        created_at=created_at,
    )


def _artifacts_of(numbers: set[int | None], connection: Connection, uid: str) -> dict[int | None, Artifact]:
    """Return artifacts by row id: those in `numbers`, or all of the adapter if these are over 1000."""
    if len(numbers) > 1000:
        return dict(artifacts_by_id(connection, uid).items())
    query = select(artifacts.c.id, artifacts.c.sha256, artifacts.c.length, artifacts.c.nonce)
    rows = connection.execute(query.where(artifacts.c.id.in_(numbers - {None})))
    return {number: Artifact(sha256, length, nonce) for number, sha256, length, nonce in rows}


@lru_cache(maxsize=4096)
def _target(text: str) -> Target:
    """Decode a target. Cached, because thousands of examples share a few labels; numbers decode fast."""
    return decode_target(text)
