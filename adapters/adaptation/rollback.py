"""Rollback: an older version is live again, and the adapter's examples are those that it was fitted on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from adapters.adaptation.commands import ExampleEdit, RevisionResult
from adapters.adaptation.options import terms_of
from adapters.adaptation.repository import AdapterRepository, AdapterSnapshot
from adapters.adaptation.revision.files import AdapterContext
from adapters.adaptation.revision.writer import RevisionWriter
from adapters.examples.validation import ValidExample
from adapters.registry.errors import AliasMoved, UnknownAdapter
from adapters.registry.idempotency import PendingReply
from adapters.registry.records import AdapterRecord, ExampleRecord
from adapters.storage.formats import Evidence
from adapters.threads import DATABASE
from models.errors import CodedError, Conflict

Gone = Literal["not_kept", "other_input"]
"""not_kept: a replacement has forgotten the example. other_input: its id now has another input."""


class CannotRestore(CodedError, Conflict):
    """The version's examples cannot be restored; `code` says why, the message what to do."""


@dataclass(frozen=True, slots=True)
class Missing:
    """An example of the version that cannot be restored."""

    id: str
    reason: Gone


@dataclass(frozen=True, slots=True)
class Rollback:
    """The changes that restore a version's examples."""

    changed: Sequence[ValidExample]  # the kept examples that must change, as they will be
    # Numbers of `changed`. One example may be both taken back and relabelled.
    taken_back: int
    relabelled: int
    set_aside: int
    in_use: int  # number of the version's examples in use afterwards
    missing: Sequence[Missing]  # the version's examples that cannot be restored


@dataclass(frozen=True, slots=True)
class RestoredVersion:
    """The adapter after a rollback to the version with this number."""

    version: int
    rollback: Rollback
    revised: RevisionResult

    @property
    def adapter(self) -> AdapterRecord:
        """The adapter, with the version live."""
        return self.revised.adapter


class Restorer:
    """Restores versions. For one event loop."""

    def __init__(self, writer: RevisionWriter) -> None:
        self._writer = writer
        self._repository: AdapterRepository = writer.repository

    async def restore(
        self,
        tenant: str,
        name: str,
        number: int,
        if_match: str | None = None,
        reply: PendingReply[RestoredVersion] | None = None,
    ) -> RestoredVersion:
        """Make the version live, and the adapter's examples those that it was fitted on.

        They get the targets back that they had then, and keep their present groups. All others are set aside.
        No version is made, and a rollback in force ends: with later examples set aside, there is nothing left
        to withhold. `if_match`: an AdapterRecord.etag that must still hold. `reply`: recorded in the same
        transaction. Raises UnknownAdapter, UnknownVersion, AliasMoved, CannotRestore, and what
        RevisionWriter.revise raises.
        """

        async def step(state: AdapterSnapshot | None) -> RestoredVersion:
            if state is None:
                raise UnknownAdapter(name)
            if if_match is not None and if_match != state.adapter.etag:
                raise AliasMoved(
                    f"Version {state.adapter.live} is live now, not the one in If-Match. Read the "
                    "adapter again."
                )
            rollback = await self._rollback(state, number)

            def restored(revised: RevisionResult) -> RestoredVersion:
                return RestoredVersion(number, rollback, revised)

            edit = ExampleEdit(rollback.changed, fit=False, live=number)
            subject = AdapterContext.of(tenant, name, terms_of(state.adapter), state)
            return restored(await self._writer.revise(subject, edit, {}, reply=reply and reply.of(restored)))

        return await self._writer.in_turn(tenant, name, step)

    async def _rollback(self, state: AdapterSnapshot, number: int) -> Rollback:
        adapter = state.adapter
        # The version is loaded before it goes live, so that no prediction in this process waits for it.
        alias = await DATABASE.run(self._repository.registry.resolve, adapter.tenant, adapter.name, number)
        await self._repository.aliases.prepare(alias)
        evidence = await self._repository.evidence(adapter, number)
        if evidence is None:
            # This raises UnknownVersion if the version has just been deleted.
            await DATABASE.run(self._repository.registry.version, adapter.uid, number)
            raise CannotRestore(
                "evidence_lost",
                f"The examples of version {number} are not known any more. PUT aliases/live "
                "promotes it without.",
            )
        rollback = await asyncio.to_thread(plan_rollback, state.examples, evidence)
        # A version that was fitted on names alone has no examples.
        if evidence.ids and not rollback.in_use:
            raise CannotRestore(
                "examples_gone",
                f"No example of version {number} is kept any more. PUT aliases/live promotes it without.",
            )
        return rollback


def plan_rollback(kept: Sequence[ExampleRecord], evidence: Evidence) -> Rollback:
    """Return the changes after which the examples in use are the evidence's again."""
    there = {one.id: one for one in kept}
    sampled = evidence.sampled or (None,) * len(evidence.ids)
    wanted: dict[str, ValidExample] = {}
    missing: list[Missing] = []
    for example, digest, target, measured in zip(
        evidence.ids, evidence.digests, evidence.targets, sampled, strict=True
    ):
        now = there.get(example)
        if now is None or now.digest != digest:
            missing.append(Missing(example, "not_kept" if now is None else "other_input"))
            continue
        wanted[example] = replace(
            _as_it_is(now),
            target=target,
            sampled=now.sampled if measured is None else measured,
            excluded=False,
        )
    changed = list(_changes(kept, wanted))
    return Rollback(
        changed=changed,
        taken_back=sum(there[one.id].excluded and not one.excluded for one in changed),
        relabelled=sum(there[one.id].target != one.target for one in changed),
        set_aside=sum(one.excluded for one in changed),
        in_use=len(wanted),
        missing=missing,
    )


def _changes(kept: Sequence[ExampleRecord], wanted: dict[str, ValidExample]) -> Iterator[ValidExample]:
    for one in kept:
        now = _as_it_is(one)
        then = wanted.get(one.id) or replace(now, excluded=True)
        if then != now:
            yield then


def _as_it_is(one: ExampleRecord) -> ValidExample:
    return ValidExample(
        one.id, one.digest, one.target, None, None, one.group, one.sampled, excluded=one.excluded
    )
