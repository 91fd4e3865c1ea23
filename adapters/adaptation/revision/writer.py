"""One revision of an adapter: its examples change, a head is fitted on them, both are committed together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar
from weakref import WeakValueDictionary

from adapters.adaptation.commands import AdapterFull, AdapterLimits, ExampleEdit, NothingToFit, RevisionResult
from adapters.adaptation.names.label_names import LabelNameEmbedder
from adapters.adaptation.options import check_costs
from adapters.adaptation.promotion.candidate import CandidateFitter, timed
from adapters.adaptation.publication import BackgroundPublish, Publication
from adapters.adaptation.repository import AdapterRepository, AdapterSnapshot
from adapters.adaptation.revision.files import (
    AdapterContext,
    Fit,
    RevisionFiles,
    change_of,
    complete,
    gather,
    new_files,
    publish_bundle,
)
from adapters.adaptation.revision.layout import LayoutPlan, plan_change
from adapters.cache.lru import ByteLRU
from adapters.examples.meanings import check_spelling
from adapters.examples.target import label_set
from adapters.heads.head import Head
from adapters.probe.fit import OneLabel, TooCostly
from adapters.processes.fit_client import Fitter
from adapters.registry.errors import RevisionMoved
from adapters.registry.idempotency import PendingReply
from adapters.registry.records import Committed
from adapters.storage.artifact import MissingArtifact
from models.arrays import Floats

T = TypeVar("T")

logger = logging.getLogger("topwork")

ATTEMPTS = 5
# Changes of one tenant that are worked on at once. They wait for each other's fits anyway, and a burst of
# more would keep the interpreter busy while other tenants' requests need it.
_CHANGES_AT_ONCE = 4


@dataclass(slots=True)
class _Turn:
    """The lock of one adapter; deleted when no request holds it or waits for it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    wanted: int = 0


class RevisionWriter:
    """Revises adapters, one revision at a time per adapter. For one event loop.

    `observe(stage, seconds)` is called with the stages fit and publish.
    """

    def __init__(
        self,
        repository: AdapterRepository,
        fitter: Fitter,
        heads: ByteLRU[Head],
        names: LabelNameEmbedder,
        limits: AdapterLimits = AdapterLimits(),
        observe: Callable[[str, float], None] = lambda stage, seconds: None,
    ) -> None:
        self.repository = repository
        self.limits = limits
        self.names = names
        self.candidates = CandidateFitter(repository, fitter, heads, names, limits.probe, observe)
        self._observe = observe
        self._turns: dict[tuple[str, str], _Turn] = {}
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    def place(self, tenant: str) -> asyncio.Semaphore:
        """Return what work on a change by the tenant holds, so that only a few are worked on at once."""
        return self._places.setdefault(tenant, asyncio.Semaphore(_CHANGES_AT_ONCE))

    async def in_turn(
        self,
        tenant: str,
        name: str,
        step: Callable[[AdapterSnapshot | None], Awaitable[T]],
        known: AdapterSnapshot | None = None,
    ) -> T:
        """Run `step` on the current adapter while no other request of this process revises it.

        If another process revises it meanwhile, the step runs again on the newer state. The step holds a
        `place`, so the caller must hold none. Raises RevisionMoved if that keeps happening, and what the
        step raises.
        """
        async with self._turn((tenant, name)), self.place(tenant):
            for _ in range(ATTEMPTS - 1):
                known = await self.repository.state(tenant, name, known)
                try:
                    return await step(known)
                except RevisionMoved:
                    continue
                except MissingArtifact:
                    # A file deleted with its owner is no loss: the next step sees the newer state.
                    now = await self.repository.state(tenant, name)
                    if now is not None and known is not None and now.same_as(known):
                        raise
            return await step(await self.repository.state(tenant, name, known))

    @asynccontextmanager
    async def _turn(self, key: tuple[str, str]) -> AsyncIterator[None]:
        turn = self._turns.setdefault(key, _Turn())
        turn.wanted += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.wanted -= 1
            if not turn.wanted:
                del self._turns[key]

    async def revise(
        self,
        subject: AdapterContext,
        edit: ExampleEdit,
        fresh: Mapping[str, Floats],
        ahead: BackgroundPublish | None = None,
        reply: PendingReply[RevisionResult] | None = None,
    ) -> RevisionResult:
        """Plan, fit, publish and commit one edit of the adapter, or create it.

        `fresh`: embeddings, float32 (dim,), by digest, of the inputs that the adapter does not have; it may
        hold more. `ahead`: the new inputs' file, if it is already being published. `reply`: recorded in the
        same transaction; its timings do not include the publication. Raises OneLabel, NothingToFit,
        AdapterFull, LabelsInvalid, WeightsLabelUnknown, TooCostly, RevisionMoved, AlreadyAnswered, and what
        fitter, store and registry raise; nothing is recorded then.
        """
        plan = await asyncio.to_thread(self._plan, subject, edit)
        fresh = await complete(self.repository, subject, plan, fresh)
        timings: dict[str, float] = {}
        fit = await self._fit(subject, plan, edit, fresh, timings)

        def revised(committed: Committed) -> RevisionResult:
            return RevisionResult(committed, None if fit is None else fit.decision, timings)

        with timed(timings, "publish", self._observe):
            async with Publication(self.repository, subject.tenant, subject.uid) as publication:
                files = await self._publish(publication, subject, plan, fresh, fit, ahead)
                change = change_of(subject, edit, plan, files, fit)
                committed = await publication.commit(change, reply and reply.of(revised))
        await self.candidates.warm(committed, fit)
        return revised(committed)

    async def _publish(
        self,
        publication: Publication,
        subject: AdapterContext,
        plan: LayoutPlan,
        fresh: Mapping[str, Floats],
        fit: Fit | None,
        ahead: BackgroundPublish | None,
    ) -> RevisionFiles:
        """Publish the files of a revision."""
        encoders = new_files(subject, plan, fresh, fit)
        early = None
        if ahead is not None and ahead.fits(subject.uid, [example.digest for example in plan.fresh]):
            early = ahead
            del encoders["inputs"]
        published = dict(zip(encoders, await publication.publish(list(encoders.values())), strict=True))
        inputs = published.get("inputs") if early is None else await publication.take(early)
        # Bundles are published one by one: together they may be all that the adapter keeps.
        rewritten = [
            await publish_bundle(self.repository, publication, subject, bundle) for bundle in plan.bundles
        ]
        return RevisionFiles(
            embeddings=published.get("embeddings"),
            inputs=inputs,
            head=published.get("head"),
            evidence=published.get("evidence"),
            rewritten=tuple(rewritten),
        )

    def _plan(self, subject: AdapterContext, edit: ExampleEdit) -> LayoutPlan:
        """Return the plan. Raises AdapterFull, LabelsInvalid, WeightsLabelUnknown.

        Slow with tens of thousands of examples: for a thread.
        """
        plan = _plan_of(subject, edit)
        kept, rows = subject.examples, plan.rows
        if edit.uploaded is not None:
            counted = edit.uploaded | plan.upserted
            kept, rows = (), tuple(row for row in rows if row.id in counted)
        # An adapter that is over a limit, as a cancelled replacement may leave it, may still shrink.
        if len(rows) > max(self.limits.max_examples, len(kept)):
            raise AdapterFull(
                f"An adapter has at most {self.limits.max_examples:,} examples. Delete some, or use "
                "another adapter."
            )
        terms, adapter = subject.terms, subject.adapter
        meanings, costs = ({}, {}) if adapter is None else (adapter.meanings, adapter.costs)
        labels = label_set(terms.task, [row.target for row in rows if not row.excluded])
        before = label_set(terms.task, [one.target for one in kept if not one.excluded]) | meanings.keys()
        if terms.meanings != meanings:
            check_spelling(terms.meanings, labels)
        labels |= terms.meanings.keys()
        if terms.costs != costs:
            check_costs(terms.costs, labels | label_set(terms.task, [row.target for row in plan.rows]))
        if len(labels) > max(self.limits.max_labels, len(before)):
            raise AdapterFull(
                f"An adapter has at most {self.limits.max_labels:,} labels. Use another adapter."
            )
        return plan

    async def _fit(
        self,
        subject: AdapterContext,
        plan: LayoutPlan,
        edit: ExampleEdit,
        fresh: Mapping[str, Floats],
        timings: dict[str, float],
    ) -> Fit | None:
        if not edit.fit:
            return None
        learned = replace(plan, rows=plan.in_use)
        try:
            embeddings = await gather(self.repository, subject, learned, fresh)
            return await self.candidates.fit(
                subject.adapter,
                subject.terms,
                learned.rows,
                embeddings,
                edit.promote,
                timings,
                edit.removals,
                tenant=subject.tenant,
            )
        except (OneLabel, NothingToFit, TooCostly):
            if edit.required:
                raise
            return None


def _plan_of(subject: AdapterContext, edit: ExampleEdit) -> LayoutPlan:
    if not edit.clear or edit.uploaded is None:
        return plan_change(subject.examples, edit.upserts, removals=edit.removals, clear=edit.clear)
    others = {one.id for one in subject.examples} - edit.uploaded
    plan = plan_change(subject.examples, (), removals=others)
    # The change forgets all examples that it does not write, so those that stay are written again.
    return replace(plan, upserted=frozenset(row.id for row in plan.rows))
