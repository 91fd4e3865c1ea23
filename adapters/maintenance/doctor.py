"""Repairs the damage that an inspection finds, as far as that is possible without a backup."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from sqlalchemy import Connection

from adapters.adaptation.artifacts import delete_unreferenced, kept_if_committed
from adapters.maintenance.inspection import Damage, Finding, InspectedAdapter, Inspector
from adapters.registry.database import Database
from adapters.registry.errors import RevisionMoved, UnknownAdapter
from adapters.registry.jobs import stored_for_jobs
from adapters.registry.records import Change, ExampleRecord, Repoint
from adapters.registry.statements.commit import commit
from adapters.registry.statements.queries import artifacts_by_id
from adapters.registry.statements.repair import drop_evidence, drop_versions, recount
from adapters.storage.artifact import Artifact, MissingArtifact, Store
from adapters.storage.formats import decode_inputs, encode_embeddings
from adapters.storage.sweeper import SWEPT_AGE, bring_back, orphans
from models.backbone import Backbone

_CHANGED = "The examples changed meanwhile; run this again."

Open = Callable[[str], Backbone | None]
"""Opens a backbone by name; returns None if this host has no export of it."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Totals of a run."""

    adapters: int
    artifacts: int
    artifact_bytes: int
    findings: int
    repaired: int
    left: int  # findings that are not repaired


class Doctor:
    """Inspects all rows and artifacts, and repairs them if `repair` is set.

    Blocking; services may run meanwhile. `open_backbone`: called once per name, to embed inputs again; the
    caller closes the backbones. `older_than`: age in seconds from which an unreferenced file is a finding.
    """

    def __init__(
        self,
        database: Database,
        store: Store,
        open_backbone: Open,
        *,
        repair: bool = False,
        older_than: float = SWEPT_AGE,
    ) -> None:
        self._database = database
        self._store = store
        self._open = open_backbone
        self._repair = repair
        self._older_than = older_than
        self._inspector = Inspector(database, store)
        self._backbones: dict[str, Backbone | None] = {}
        self._found = 0
        self._repaired = 0

    def findings(self) -> Iterator[Finding]:
        """Yield each finding, after its repair if `repair` is set."""
        for finding in self._all():
            self._found += 1
            self._repaired += finding.repaired
            yield finding

    def summary(self) -> Summary:
        """Return the totals so far."""
        read = asdict(self._inspector.read)
        return Summary(
            **read, findings=self._found, repaired=self._repaired, left=self._found - self._repaired
        )

    def _all(self) -> Iterator[Finding]:
        if self._repair:
            bring_back(self._store, self._referenced)
        yield from self._inspector.database()
        for uid in self._inspector.uids():
            state, damages = self._inspector.adapter(uid)
            if state is None or not damages:
                continue
            if self._repair:
                yield from self._mend(state, damages)
            else:
                yield from (damage.finding for damage in damages)
        yield from self._unreferenced()

    def _unreferenced(self) -> Iterator[Finding]:
        for left in orphans(self._store.objects(), self._referenced, self._older_than):
            if self._repair:
                self._store.put_aside(left)
            tenant, uid = left[0].tenant, left[0].adapter_uid
            detail = (
                f"{len(left)} files of the adapter {uid} that no row refers to. --repair puts them aside; "
                "the service deletes them after a week."
            )
            yield Finding(tenant, "", "files", "unreferenced", detail, repaired=self._repair)

    def _referenced(self, *uids: str) -> set[Artifact]:
        with self._database.reading() as connection:
            return set(artifacts_by_id(connection, *uids).values()) | stored_for_jobs(connection, *uids)

    def _mend(self, state: InspectedAdapter, damages: Sequence[Damage]) -> Iterator[Finding]:
        """Repair an adapter. Damaged versions go first and together, so that none of them becomes live."""
        uid = state.record.uid
        versions = {number for damage in damages for number in damage.versions}
        evidence = {number for damage in damages for number in damage.evidence} - versions
        try:
            if versions or any(damage.live for damage in damages):
                self._write(state, lambda connection: drop_versions(connection, uid, versions))
            if evidence:
                self._write(state, lambda connection: drop_evidence(connection, uid, evidence))
            if any(damage.recount for damage in damages):
                self._write(state, lambda connection: recount(connection, uid))
        except UnknownAdapter:
            # The adapter was deleted, and the damaged rows and files with it.
            yield from (replace(damage.finding, repaired=True) for damage in damages)
            return
        for damage in damages:
            if damage.examples:
                yield self._mend_examples(state, damage)
            else:
                simple = damage.versions or damage.evidence or damage.live or damage.recount
                yield replace(damage.finding, repaired=bool(simple))

    def _write(self, state: InspectedAdapter, change: Callable[[Connection], tuple[Artifact, ...]]) -> None:
        """Change the rows, and delete the files that become unreferenced."""
        with self._database.writing() as connection:
            unreferenced = change(connection)
        delete_unreferenced(self._store, state.record.tenant, state.record.uid, unreferenced)

    def _mend_examples(self, state: InspectedAdapter, damage: Damage) -> Finding:
        if damage.segment is None:
            moved = [Repoint(one.id, one.segment, one.row, None) for one in damage.examples]
            return self._repoint(state, damage, moved)
        inputs = damage.examples[0].inputs
        if inputs is None or damage.inputs is not None:
            return damage.finding
        record = state.record
        if record.backbone not in self._backbones:
            self._backbones[record.backbone] = self._open(record.backbone)
        backbone = self._backbones[record.backbone]
        if backbone is None or backbone.fingerprint != record.fingerprint:
            detail = f"The backbone {record.backbone} with which it was embedded is not exported here."
            return replace(damage.finding, detail=detail)
        try:
            posted = decode_inputs(self._store.read(record.tenant, record.uid, inputs))
        except MissingArtifact:
            # A service has just rewritten the examples, and deleted their old files.
            return replace(damage.finding, detail=_CHANGED)
        embedded = backbone.embed(posted)
        if embedded.errors.keys() & {one.row for one in damage.examples}:
            return replace(damage.finding, detail="Some of the inputs cannot be embedded any more.")
        vectors = np.ascontiguousarray(embedded.embeddings)
        new = self._store.publish(record.tenant, record.uid, encode_embeddings(vectors, record.fingerprint))
        return self._repoint(
            state, damage, [Repoint(one.id, new, one.row, one.inputs) for one in damage.examples]
        )

    def _repoint(self, state: InspectedAdapter, damage: Damage, moved: Sequence[Repoint]) -> Finding:
        """Point the examples at other files, unless they have changed since they were read."""
        tenant, uid = state.record.tenant, state.record.uid
        new = () if damage.segment is None else {one.segment for one in moved}
        try:
            with kept_if_committed(self._store, tenant, uid, new), self._database.writing() as connection:
                now = InspectedAdapter.read(connection, uid)
                if _places(now.examples, damage) != _places(damage.examples, damage):
                    raise RevisionMoved("The examples changed meanwhile.")
                change = Change(
                    tenant=now.record.tenant,
                    name=now.record.name,
                    uid=uid,
                    revision=now.record.revision,
                    repoints=tuple(moved),
                )
                unreferenced = commit(connection, change).unreferenced
        except (RevisionMoved, UnknownAdapter):
            return replace(damage.finding, detail=_CHANGED)
        delete_unreferenced(self._store, tenant, uid, unreferenced)
        return replace(damage.finding, repaired=True)


def _places(examples: Sequence[ExampleRecord], damage: Damage) -> set[tuple[str, str, int]]:
    """Return the ids and places of the examples in the damaged files."""
    files = {damage.examples[0].segment, damage.examples[0].inputs}
    return {
        (one.id, one.segment.name, one.row) for one in examples if one.segment in files or one.inputs in files
    }
