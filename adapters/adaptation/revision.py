"""One revision of an adapter: its examples change, a head is fitted on them, both are committed together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from adapters.adaptation.commands import AdapterFull, AdapterLimits, ExampleEdit, NothingToFit, RevisionResult
from adapters.adaptation.layout import LayoutPlan, PlannedExample, plan_change
from adapters.adaptation.promotion.agreement import Agreement, ask
from adapters.adaptation.promotion.decision import Decision, Promote, best_of, decide, remember, unlearned
from adapters.adaptation.publication import Publication
from adapters.adaptation.repository import AdapterRepository, AdapterSnapshot, BackgroundPublish
from adapters.adaptation.revision_files import (
    AdapterContext,
    Fit,
    RevisionFiles,
    change_of,
    complete,
    gather,
    new_files,
    publish_bundle,
)
from adapters.cache.lru import ByteLRU
from adapters.examples.target import label_set
from adapters.heads.head import CorruptHead, Head
from adapters.probe.fit import Dataset, OneLabel
from adapters.processes.fit_client import Fitter
from adapters.registry.errors import RevisionMoved, UnknownVersion
from adapters.registry.idempotency import PendingReply
from adapters.registry.records import AdapterRecord, Committed, Creation, VersionRecord
from adapters.storage.artifact import CorruptArtifact, MissingArtifact
from adapters.storage.formats import Evidence
from models.arrays import Floats

T = TypeVar("T")

logger = logging.getLogger("topwork")

ATTEMPTS = 5


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
        limits: AdapterLimits = AdapterLimits(),
        observe: Callable[[str, float], None] = lambda stage, seconds: None,
    ) -> None:
        self.repository = repository
        self.limits = limits
        self._fitter = fitter
        self._heads = heads
        self._observe = observe
        self._turns: dict[tuple[str, str], _Turn] = {}

    async def in_turn(
        self,
        tenant: str,
        name: str,
        step: Callable[[AdapterSnapshot | None], Awaitable[T]],
        known: AdapterSnapshot | None = None,
    ) -> T:
        """Run `step` on the current adapter while no other request of this process revises it.

        If another process revises it meanwhile, the step runs again on the newer state. Raises RevisionMoved
        if that keeps happening, and what the step raises.
        """
        async with self._turn((tenant, name)):
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
        AdapterFull, TooCostly, RevisionMoved, AlreadyAnswered, and what fitter, store and registry raise;
        nothing is recorded then.
        """
        plan = await asyncio.to_thread(self._plan, subject, edit)
        fresh = await complete(self.repository, subject, plan, fresh)
        timings: dict[str, float] = {}
        fit = await self._fit(subject, plan, edit, fresh, timings)

        def revised(committed: Committed) -> RevisionResult:
            return RevisionResult(committed, None if fit is None else fit.decision, timings)

        with _timed(timings, "publish", self._observe):
            async with Publication(self.repository, subject.tenant, subject.uid) as publication:
                files = await self._publish(publication, subject, plan, fresh, fit, ahead)
                change = change_of(subject, edit, plan, files, fit)
                committed = await publication.commit(change, reply and reply.of(revised))
        await self.warm(committed, fit)
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

    async def fit(
        self,
        adapter: AdapterRecord | None,
        terms: Creation,
        rows: Sequence[PlannedExample],
        embeddings: Floats,
        promote: Promote,
        timings: dict[str, float],
        removals: Collection[str] = (),
        *,
        tenant: str,
    ) -> Fit:
        """Fit a head on the rows, with its report and the decision whether it may be live.

        `removals`: examples that are erased together with the versions that learned from them. `tenant`:
        owner of the fit; tenants take turns.
        """
        if not rows:
            raise NothingToFit("The adapter has no examples in use; send some, or take some back.")
        targets = [row.target for row in rows]
        digests = [row.digest for row in rows]
        dataset = Dataset(
            embeddings=embeddings,
            targets=targets,
            digests=digests,
            task=terms.task,
            fingerprint=terms.fingerprint,
            groups=[row.group or "" for row in rows],
            sampled=[row.sampled for row in rows],
        )
        config = replace(
            self.limits.probe,
            answer_accuracy=terms.answer_accuracy,
            balanced=terms.weights == "balanced",
        )
        with _timed(timings, "fit", self._observe):
            fitted = await self._fitter.fit(dataset, config, tenant=tenant)
        ids = tuple(row.id for row in rows)
        evidence = Evidence(ids, tuple(digests), tuple(targets), fitted.scores, tuple(dataset.sampled))
        evidence, decision = await self._decided(adapter, dataset, evidence, promote, removals)
        return Fit(
            fitted.head, evidence, with_ids(fitted.report, ids) | {"promotion": decision.to_json()}, decision
        )

    async def _decided(
        self,
        adapter: AdapterRecord | None,
        dataset: Dataset,
        evidence: Evidence,
        promote: Promote,
        removals: Collection[str],
    ) -> tuple[Evidence, Decision]:
        """Return the evidence with the history to keep, and the decision on a fit with this evidence."""
        task = dataset.task
        rival = None if adapter is None else await self.repository.rival(adapter, removals)
        if adapter is None or rival is None:
            decision = decide(promote, task, evidence, None)
            erased = adapter is not None and adapter.live is not None and promote == "if_better"
            return evidence, replace(decision, reason="example_removed") if erased else decision
        live = await self.repository.evidence(adapter, rival.number)
        if live is not None:
            said = await self._ask(adapter, rival, live, dataset, evidence)
            evidence = await asyncio.to_thread(remember, evidence, live, rival.number, *said)
        held = adapter.rolled_back_at is not None
        decision = await asyncio.to_thread(decide, promote, task, evidence, live, held=held)
        fallback = None
        if decision.fallback is not None and decision.fallback != rival.number:
            older = await asyncio.to_thread(self._kept, adapter, decision.fallback)
            # The backbone of an older version may no longer be served.
            if older is not None and older.fingerprint == dataset.fingerprint:
                fallback = older.number
        if rival.number != adapter.live:
            # The live version is erased: the new one follows it, or the one that it was compared with.
            if decision.promote:
                decision = replace(decision, reason="example_removed")
            else:
                fallback = fallback or rival.number
        decision = replace(decision, fallback=fallback)
        return evidence if decision.proved else replace(evidence, history=None), decision

    async def _ask(
        self, adapter: AdapterRecord, rival: VersionRecord, live: Evidence, dataset: Dataset, new: Evidence
    ) -> tuple[Sequence[int], Agreement | None]:
        """Return the rows that the rival has not learned, and what the best version so far says of them.

        A fine-tuned version, or one of another backbone, is not asked: its embeddings are different ones.
        """
        number, known = best_of(live, rival.number)
        asked = rival
        if number != rival.number:
            best = await asyncio.to_thread(self._kept, adapter, number)
            asked, known = (rival, live) if best is None else (best, known)
        if asked.network is not None or asked.fingerprint != dataset.fingerprint:
            return (), None
        rows = await asyncio.to_thread(unlearned, dataset.task, new, known)
        if not rows:
            return (), None

        async def read() -> Head:
            return await self.repository.read(adapter.tenant, adapter.uid, asked.artifact, Head.from_bytes)

        try:
            head = await self._heads.get(asked.artifact.sha256, read, (adapter.tenant, adapter.name))
        except (MissingArtifact, CorruptArtifact, CorruptHead) as error:
            # An unreadable head must not keep a tenant from adapting.
            logger.warning("version %d is not asked about new examples: %s", asked.number, error)
            return (), None
        embeddings, targets = dataset.embeddings[rows], [new.targets[row] for row in rows]
        said = await asyncio.to_thread(ask, dataset.task, head, known, embeddings, targets)
        return rows, said

    def _kept(self, adapter: AdapterRecord, number: int) -> VersionRecord | None:
        try:
            return self.repository.registry.version(adapter.uid, number)
        except UnknownVersion:
            return None

    async def warm(self, committed: Committed, fit: Fit | None) -> None:
        """Keep a committed head in memory, because predictions are likely to follow."""
        if fit is None or committed.version is None:
            return

        async def loaded() -> Head:
            return fit.head

        adapter = committed.adapter
        await self._heads.get(committed.version.artifact.sha256, loaded, (adapter.tenant, adapter.name))

    def _plan(self, subject: AdapterContext, edit: ExampleEdit) -> LayoutPlan:
        """Return the plan. Raises AdapterFull. Slow with tens of thousands of examples: for a thread."""
        plan = _plan_of(subject, edit)
        kept, rows = subject.examples, plan.rows
        if edit.uploaded is not None:
            counted = edit.uploaded | plan.upserted
            kept, rows = (), tuple(row for row in rows if row.id in counted)
        # An adapter that is over a limit, as a cancelled replacement may leave it, may still shrink.
        if len(rows) > max(self.limits.max_examples, len(kept)):
            raise AdapterFull(f"An adapter keeps at most {self.limits.max_examples:,} examples.")
        labels = label_set(subject.terms.task, [row.target for row in rows if not row.excluded])
        before = label_set(subject.terms.task, [one.target for one in kept if not one.excluded])
        if len(labels) > max(self.limits.max_labels, len(before)):
            raise AdapterFull(f"An adapter has at most {self.limits.max_labels:,} labels.")
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
            return await self.fit(
                subject.adapter,
                subject.terms,
                learned.rows,
                embeddings,
                edit.promote,
                timings,
                edit.removals,
                tenant=subject.tenant,
            )
        except (OneLabel, NothingToFit):
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


def with_ids(report: Mapping[str, Any], ids: Sequence[str]) -> dict[str, Any]:
    """Return a fit's report with suspects named by their ids instead of their rows."""
    suspects = [
        {"id": ids[suspect["index"]], **{key: value for key, value in suspect.items() if key != "index"}}
        for suspect in report.get("suspects", ())
    ]
    return {**report, "suspects": suspects}


@contextmanager
def _timed(timings: dict[str, float], stage: str, observe: Callable[[str, float], None]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - started
    observe(stage, timings[stage])
