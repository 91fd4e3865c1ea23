"""Fits a head on an adapter's examples, and decides whether it may go live."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from adapters.adaptation.commands import NothingToFit
from adapters.adaptation.names.label_names import LabelNameEmbedder
from adapters.adaptation.promotion.agreement import Agreement, ask
from adapters.adaptation.promotion.decision import Decision, Promote, best_of, decide, remember, unlearned
from adapters.adaptation.repository import AdapterRepository
from adapters.adaptation.revision.files import Fit
from adapters.adaptation.revision.layout import PlannedExample
from adapters.cache.lru import ByteLRU
from adapters.examples.target import label_set
from adapters.heads.head import CorruptHead, Head
from adapters.probe.fit import Dataset, ProbeConfig
from adapters.processes.fit_client import Fitter
from adapters.registry.errors import UnknownVersion
from adapters.registry.records import AdapterRecord, Committed, Creation, VersionRecord
from adapters.storage.artifact import CorruptArtifact, MissingArtifact
from adapters.storage.formats import Evidence
from adapters.threads import DATABASE
from models.arrays import Floats

logger = logging.getLogger("topwork")


class CandidateFitter:
    """Fits heads, and compares each with the versions before it. For one event loop.

    `observe(stage, seconds)` is called with the stage fit.
    """

    def __init__(
        self,
        repository: AdapterRepository,
        fitter: Fitter,
        heads: ByteLRU[Head],
        names: LabelNameEmbedder,
        config: ProbeConfig,
        observe: Callable[[str, float], None],
    ) -> None:
        self._repository = repository
        self._fitter = fitter
        self._heads = heads
        self._names = names
        self._config = config
        self._observe = observe

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
        """Fit a head on the rows and the names of labels, and decide whether it may be live.

        `embeddings`: of the rows, float32 (n, dim); of any dim if there are none. `timings`: gets the seconds
        of the stage fit. `removals`: ids of examples that are erased together with the versions that learned
        from them. `tenant`: owner of the fit; tenants take turns. Raises NothingToFit, and what Fitter.fit,
        LabelNameEmbedder.read, registry and store raise.
        """
        read = await self._names.read(tenant, terms)
        if not rows:
            if not read.names.directions:
                raise NothingToFit(_nothing_to_fit(terms, read.warnings))
            (dim,) = next(iter(read.names.directions.values())).shape
            embeddings = np.empty((0, dim), np.float32)
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
            names=read.names,
        )
        # A label may have lost its last example since it was given a cost.
        known = label_set(terms.task, targets) | read.names.directions.keys()
        config = replace(
            self._config,
            answer_accuracy=terms.answer_accuracy,
            balanced=terms.weights == "balanced",
            costs={label: cost for label, cost in terms.costs.items() if label in known},
        )
        with timed(timings, "fit", self._observe):
            fitted = await self._fitter.fit(dataset, config, tenant=tenant)
        ids = tuple(row.id for row in rows)
        evidence = Evidence(ids, tuple(digests), tuple(targets), fitted.scores, tuple(dataset.sampled))
        evidence, decision = await self._decided(adapter, dataset, evidence, promote, removals)
        report = with_ids(fitted.report, ids) | {"promotion": decision.to_json()}
        if read.warnings:
            report["warnings"] = [*report["warnings"], *map(dict, read.warnings)]
        return Fit(fitted.head, evidence, report, decision)

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
        rival = None if adapter is None else await self._repository.rival(adapter, removals)
        if adapter is None or rival is None:
            decision = decide(promote, task, evidence, None)
            erased = adapter is not None and adapter.live is not None and promote == "if_better"
            return evidence, replace(decision, reason="example_removed") if erased else decision
        live = await self._repository.evidence(adapter, rival.number)
        if live is not None:
            said = await self._ask(adapter, rival, live, dataset, evidence)
            evidence = await asyncio.to_thread(remember, evidence, live, rival.number, *said)
        held = adapter.rolled_back_at is not None
        decision = await asyncio.to_thread(decide, promote, task, evidence, live, held=held)
        fallback = None
        if decision.fallback is not None and decision.fallback != rival.number:
            older = await DATABASE.run(self._kept, adapter, decision.fallback)
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
            best = await DATABASE.run(self._kept, adapter, number)
            asked, known = (rival, live) if best is None else (best, known)
        if asked.network is not None or asked.fingerprint != dataset.fingerprint:
            return (), None
        rows = await asyncio.to_thread(unlearned, dataset.task, new, known)
        if not rows:
            return (), None

        async def read() -> Head:
            return await self._repository.read(adapter.tenant, adapter.uid, asked.artifact, Head.from_bytes)

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
            return self._repository.registry.version(adapter.uid, number)
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


def _nothing_to_fit(terms: Creation, warnings: Sequence[Mapping[str, str]]) -> str:
    if not terms.meanings:
        return "The adapter has no examples to fit on. Send some, or include excluded ones again."
    if len(terms.meanings) < 2:
        return (
            "The adapter has no examples to fit on, and only one name of a label. Name another, or send some."
        )
    why = " ".join(warning["detail"] for warning in warnings)
    return f"The adapter has no examples to fit on, and the names of its labels cannot be told apart. {why}"


def with_ids(report: Mapping[str, Any], ids: Sequence[str]) -> dict[str, Any]:
    """Return a fit's report with suspects named by their ids instead of their rows."""
    suspects = [
        {"id": ids[suspect["index"]], **{key: value for key, value in suspect.items() if key != "index"}}
        for suspect in report.get("suspects", ())
    ]
    return {**report, "suspects": suspects}


@contextmanager
def timed(timings: dict[str, float], stage: str, observe: Callable[[str, float], None]) -> Iterator[None]:
    """Record the seconds that the block takes as those of the stage, unless it raises an error."""
    started = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - started
    observe(stage, timings[stage])
