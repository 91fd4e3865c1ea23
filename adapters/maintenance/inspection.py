"""Checks every row against its artifacts, and every artifact against its rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from sqlalchemy import Connection, Table, func, select, text

from adapters.heads.head import Head
from adapters.registry.database import Database
from adapters.registry.errors import UnknownAdapter
from adapters.registry.jobs import uploads_of
from adapters.registry.records import AdapterRecord, ExampleRecord, VersionRecord
from adapters.registry.schema import adapters, metadata
from adapters.registry.statements.queries import adapter_by_uid, example_records, version_records
from adapters.storage.artifact import Artifact, CorruptArtifact, MissingArtifact, Store
from adapters.storage.formats import decode_embeddings, decode_evidence, decode_inputs
from models.runtime.session import open_session

T = TypeVar("T")

_LOOKS = 5  # most reads of an adapter that changes during its inspection
_PAGE = 1_000  # adapters per query


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong. It never contains the contents of an example."""

    tenant: str
    adapter: str  # name; empty, like the tenant, if the finding concerns no adapter
    what: str  # the damaged thing, e.g. "version 3"
    code: str  # stable
    detail: str  # tells the operator what to do
    repaired: bool = False


@dataclass(frozen=True, slots=True)
class Damage:
    """A finding, with the details that its repair needs."""

    finding: Finding
    versions: frozenset[int] = frozenset()  # versions to delete
    evidence: frozenset[int] = frozenset()  # versions whose evidence is lost
    segment: Artifact | None = None  # the damaged embeddings of `examples`, if any
    inputs: Artifact | None = None  # the damaged inputs of `examples`, if any
    examples: tuple[ExampleRecord, ...] = ()
    live: bool = False  # the live version does not exist
    recount: bool = False  # counts are wrong


@dataclass(slots=True)
class Read:
    """Totals of what was read."""

    adapters: int = 0
    artifacts: int = 0
    artifact_bytes: int = 0


@dataclass(frozen=True, slots=True)
class InspectedAdapter:
    """An adapter with its rows, read in one transaction."""

    record: AdapterRecord
    next_version: int
    examples: Sequence[ExampleRecord]
    versions: Sequence[VersionRecord]
    uploads: frozenset[Artifact]

    @classmethod
    def read(cls, connection: Connection, uid: str) -> InspectedAdapter:
        """Read the adapter's rows. Raises UnknownAdapter."""
        record = adapter_by_uid(connection, uid)
        query = select(adapters.c.next_version).where(adapters.c.uid == uid)
        return cls(
            record,
            connection.execute(query).scalar_one(),
            example_records(connection, uid),
            version_records(connection, uid),
            frozenset(uploads_of(connection, uid)),
        )


class Inspector:
    """Inspects the database and the store. Blocking; services may run meanwhile."""

    def __init__(self, database: Database, store: Store) -> None:
        self.read = Read()
        self._database = database
        self._store = store

    def database(self) -> Iterator[Finding]:
        """Yield the findings that concern the database as a whole."""
        with self._database.reading() as connection:
            if self._database.is_sqlite:
                for (line,) in connection.execute(text("PRAGMA integrity_check")):
                    if line != "ok":
                        yield Finding("", "", "database", "damaged_database", f"{line}. Restore a backup.")
            for table in metadata.sorted_tables:
                yield from _strays(connection, table)

    def uids(self) -> Iterator[str]:
        """Yield the uid of every adapter."""
        after = ""
        while True:
            query = select(adapters.c.uid).where(adapters.c.uid > after).order_by(adapters.c.uid).limit(_PAGE)
            with self._database.reading() as connection:
                page = list(connection.scalars(query))
            if not page:
                return
            yield from page
            after = page[-1]

    def adapter(self, uid: str) -> tuple[InspectedAdapter | None, list[Damage]]:
        """Return an adapter and its damage; None and no damage if the adapter is gone.

        If damage is found and the adapter has changed meanwhile, it is inspected again.
        """
        state: InspectedAdapter | None = None
        found: list[Damage] = []
        before = replace(self.read)
        for _ in range(_LOOKS):
            earlier = state
            try:
                with self._database.reading() as connection:
                    state = InspectedAdapter.read(connection, uid)
            except UnknownAdapter:
                return None, []
            if earlier is not None and _same(earlier, state):
                break
            self.read = replace(before, adapters=before.adapters + 1)
            found = list(self._damages(state))
            if not found:
                break
        return state, found

    def _damages(self, state: InspectedAdapter) -> Iterator[Damage]:
        for version in state.versions:
            yield from self._version(state, version)
        yield from self._examples(state)
        for upload in sorted(state.uploads, key=lambda part: part.name):
            _, problem = self._load(state, upload, lambda data: data)
            if problem:
                yield Damage(_finding(state, "upload", problem, "Cancel the job and upload again."))
        yield from _counts(state)

    def _version(self, state: InspectedAdapter, version: VersionRecord) -> Iterator[Damage]:
        number = version.number
        head, problem = self._load(state, version.artifact, Head.from_bytes)
        if problem is None and head is not None and version.labels != len(head.labels):
            problem = "wrong_labels"
        if problem:
            detail = "--repair deletes the version; the newest whole one becomes live in its place."
            yield Damage(
                _finding(state, f"head of version {number}", problem, detail), versions=frozenset({number})
            )
        if version.network is not None:
            _, problem = self._load(state, version.network, _open_network)
            if problem:
                detail = "--repair deletes the version; the newest whole one becomes live in its place."
                finding = _finding(state, f"network of version {number}", problem, detail)
                yield Damage(finding, versions=frozenset({number}))
        if version.evidence is not None:
            evidence, problem = self._load(state, version.evidence, decode_evidence)
            if evidence is not None and len(evidence.ids) != len(evidence.scores):
                problem = "unreadable_artifact"
            if problem:
                detail = "--repair lets the version go on without it; nothing is compared with it then."
                finding = _finding(state, f"evidence of version {number}", problem, detail)
                yield Damage(finding, evidence=frozenset({number}))

    def _examples(self, state: InspectedAdapter) -> Iterator[Damage]:
        lying: dict[tuple[Artifact, Artifact | None], list[ExampleRecord]] = defaultdict(list)
        for example in state.examples:
            lying[example.segment, example.inputs].append(example)
        for (segment, inputs), here in lying.items():
            last = max(example.row for example in here)
            vectors, segment_problem = self._load(state, segment, decode_embeddings)
            if vectors is not None:
                segment_problem = _wrong_rows(vectors, last)
            inputs_problem: str | None = None
            if inputs is not None:
                values, inputs_problem = self._load(state, inputs, decode_inputs)
                if values is not None and last >= len(values):
                    inputs_problem = "row_out_of_range"
            if segment_problem or inputs_problem:
                yield _damaged_examples(state, (segment, segment_problem), (inputs, inputs_problem), here)

    def _load(
        self, state: InspectedAdapter, artifact: Artifact, decode: Callable[[bytes], T]
    ) -> tuple[T | None, str | None]:
        """Return the decoded artifact, or the code of what is wrong with it."""
        try:
            data = self._store.read(state.record.tenant, state.record.uid, artifact)
        except (MissingArtifact, CorruptArtifact) as error:
            return None, error.code
        self.read.artifacts += 1
        self.read.artifact_bytes += len(data)
        try:
            return decode(data), None
        # Any error of a decoder means that the bytes are damaged.
        except Exception:
            return None, "unreadable_artifact"


def _open_network(data: bytes) -> bool:
    open_session(data, device="cpu")
    return True


def _wrong_rows(vectors: Any, last: int) -> str | None:
    if vectors.ndim != 2 or last >= len(vectors):
        return "row_out_of_range"
    return None if np.isfinite(vectors).all() else "not_finite"


def _same(one: InspectedAdapter, other: InspectedAdapter) -> bool:
    return (one.record.epoch, one.uploads) == (other.record.epoch, other.uploads)


def _finding(state: InspectedAdapter, what: str, code: str, detail: str) -> Finding:
    return Finding(state.record.tenant, state.record.name, what, code, detail)


def _damaged_examples(
    state: InspectedAdapter,
    segment: tuple[Artifact, str | None],
    inputs: tuple[Artifact | None, str | None],
    here: Sequence[ExampleRecord],
) -> Damage:
    """Return the damage of examples in the same files. `segment`, `inputs`: file, and error code if any."""
    count = f"{len(here)} examples"
    lost_inputs = inputs[0] is None or inputs[1] is not None
    if segment[1] is None:
        assert inputs[1] is not None
        detail = "--repair lets the examples go on without their inputs."
        finding = _finding(state, f"inputs of {count}", inputs[1], detail)
    elif not lost_inputs:
        detail = "--repair embeds the inputs again."
        finding = _finding(state, f"embeddings of {count}", segment[1], detail)
    else:
        detail = "Embeddings and inputs are both lost: restore a backup, or remove the examples."
        finding = _finding(state, f"embeddings and inputs of {count}", segment[1], detail)
    return Damage(
        finding,
        segment=segment[0] if segment[1] else None,
        inputs=inputs[0] if inputs[1] else None,
        examples=tuple(here),
    )


def _counts(state: InspectedAdapter) -> Iterator[Damage]:
    record = state.record
    numbers = {version.number for version in state.versions}
    if record.live is not None and record.live not in numbers:
        detail = "--repair makes the newest version live."
        yield Damage(_finding(state, f"live version {record.live}", "no_such_version", detail), live=True)
    if record.examples != len(state.examples):
        detail = f"It says {record.examples}, and there are {len(state.examples)}. --repair counts again."
        yield Damage(_finding(state, "examples", "wrong_count", detail), recount=True)
    if numbers and state.next_version <= max(numbers):
        detail = "The next version would have a number that is taken. --repair counts again."
        yield Damage(_finding(state, "next version", "number_taken", detail), recount=True)


def _strays(connection: Connection, table: Table) -> Iterator[Finding]:
    """Yield a finding for each foreign key with rows that refer to missing rows."""
    for key in table.foreign_keys:
        parent = key.column
        there = select(parent).where(parent == key.parent).exists()
        query = select(func.count()).select_from(table).where(key.parent.is_not(None), ~there)
        count = connection.execute(query).scalar_one()
        if count:
            detail = (
                f"{count} rows refer to rows of {parent.table.name} that are not there. Restore a backup."
            )
            yield Finding("", "", f"{table.name}.{key.parent.name}", "broken_reference", detail)
