"""The data of a revision: embeddings gathered from their segments, and the files to publish."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from adapters.adaptation.commands import ExampleEdit
from adapters.adaptation.layout import LayoutPlan, SegmentSlot, Stored, locate
from adapters.adaptation.promotion import Decision
from adapters.adaptation.repository import AdapterRepository, AdapterSnapshot
from adapters.heads.head import Head
from adapters.registry.records import (
    AdapterRecord,
    Change,
    Creation,
    ExampleRecord,
    NewVersion,
)
from adapters.registry.registry import new_uid
from adapters.storage.artifact import Artifact, Buffer
from adapters.storage.formats import Evidence, encode_embeddings, encode_inputs
from models.arrays import Floats


@dataclass(frozen=True, slots=True)
class AdapterContext:
    """The adapter that a revision changes or, with `state` None, creates."""

    tenant: str
    name: str
    terms: Creation
    state: AdapterSnapshot | None
    uid: str

    @classmethod
    def of(
        cls, tenant: str, name: str, terms: Creation, state: AdapterSnapshot | None, uid: str | None = None
    ) -> AdapterContext:
        """Return the context. `uid`: for an adapter that is to be created; generated if None."""
        return cls(tenant, name, terms, state, (uid or new_uid()) if state is None else state.adapter.uid)

    @property
    def adapter(self) -> AdapterRecord | None:
        """The adapter, or None if it does not exist yet."""
        return None if self.state is None else self.state.adapter

    @property
    def examples(self) -> Sequence[ExampleRecord]:
        """The adapter's examples."""
        return () if self.state is None else self.state.examples


async def complete(
    repository: AdapterRepository, subject: AdapterContext, plan: LayoutPlan, fresh: Mapping[str, Floats]
) -> Mapping[str, Floats]:
    """Return `fresh` with the stored embeddings of inputs that the plan moves to the new segment."""
    missing = {example.digest for example in plan.fresh} - fresh.keys()
    if not missing:
        return fresh
    assert subject.adapter is not None
    places = {one.digest: one for one in subject.examples if one.digest in missing}
    found = await repository.embeddings(subject.adapter, list(places.values()))
    return {**fresh, **dict(zip(places, found, strict=True))}


async def gather(
    repository: AdapterRepository, subject: AdapterContext, plan: LayoutPlan, fresh: Mapping[str, Floats]
) -> Floats:
    """Return the embeddings of the planned rows, float32 (n, dim), in their order. `fresh`: by digest."""
    places = [row.source for row in plan.rows if not isinstance(row.source, int)]
    if not places:
        return _interleave(plan, None, fresh)
    assert subject.adapter is not None
    kept = await repository.embeddings(subject.adapter, places)
    return await asyncio.to_thread(_interleave, plan, kept, fresh)


def _interleave(plan: LayoutPlan, kept: Floats | None, fresh: Mapping[str, Floats]) -> Floats:
    """Merge kept embeddings, which are in the order of their rows, with fresh ones."""
    is_new = np.fromiter((isinstance(row.source, int) for row in plan.rows), np.bool_, len(plan.rows))
    new = [fresh[row.digest] for row in plan.rows if isinstance(row.source, int)]
    if kept is None:
        return np.stack(new) if new else np.empty((0, 0), np.float32)
    if not new:
        return kept
    gathered = np.empty((len(plan.rows), kept.shape[1]), np.float32)
    gathered[~is_new] = kept
    gathered[is_new] = np.stack(new)
    return gathered


async def encoders(
    repository: AdapterRepository, subject: AdapterContext, plan: LayoutPlan, fresh: Mapping[str, Floats]
) -> list[Callable[[], Buffer]]:
    """Return the encoders of the files to publish.

    They are those of the new segment's embeddings, of its inputs if kept, then the same of every bundle.
    """
    files: list[Callable[[], Buffer]] = []
    fingerprint = subject.terms.fingerprint
    if plan.fresh:
        new = np.stack([fresh[example.digest] for example in plan.fresh])
        files.append(partial(encode_embeddings, new, fingerprint))
        if subject.terms.keep_inputs:
            inputs = [example.input for example in plan.fresh if example.input is not None]
            files.append(partial(encode_inputs, inputs))
    for bundle in plan.bundles:
        assert subject.adapter is not None
        moved = await repository.embeddings(subject.adapter, bundle)
        files.append(partial(encode_embeddings, moved, fingerprint))
        if bundle[0].inputs is not None:
            files.append(partial(encode_inputs, await kept_inputs(repository, subject.adapter, bundle)))
    return files


def starts(
    plan: LayoutPlan, keep_inputs: bool, published: Sequence[Artifact]
) -> tuple[SegmentSlot | None, list[SegmentSlot], Sequence[Artifact]]:
    """Return the first slots of the new segment and of the bundles, and the artifacts left over."""
    left = iter(published)
    start = SegmentSlot(next(left), 0, next(left) if keep_inputs else None) if plan.fresh else None
    bundles = [
        SegmentSlot(next(left), 0, next(left) if bundle[0].inputs else None) for bundle in plan.bundles
    ]
    return start, bundles, list(left)


async def kept_inputs(
    repository: AdapterRepository, adapter: AdapterRecord, bundle: Sequence[Stored]
) -> list[bytes | str]:
    """Return the inputs at the places; all of them must be kept."""
    found: dict[Artifact, list[bytes | str]] = {}
    for place in bundle:
        assert place.inputs is not None
        if place.inputs not in found:
            found[place.inputs] = await repository.inputs(adapter, place.inputs)
    return [found[place.inputs][place.row] for place in bundle if place.inputs is not None]


LINEAR_PROBE = "linear_probe"


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted head with its evidence, report and promotion decision."""

    head: Head
    evidence: Evidence
    report: Mapping[str, Any]
    decision: Decision


def change_of(
    subject: AdapterContext,
    edit: ExampleEdit,
    plan: LayoutPlan,
    published: Sequence[Artifact],
    fit: Fit | None,
) -> Change:
    """The change that a revision commits: its examples with their places, and its version."""
    start, bundles, left = starts(plan, subject.terms.keep_inputs, published)
    upserts, repoints = locate(plan, start, bundles)
    state = subject.state
    return Change(
        tenant=subject.tenant,
        name=subject.name,
        uid=subject.uid,
        revision=0 if state is None else state.revision,
        create=subject.terms if state is None else None,
        clear_first=edit.clear and state is not None,
        upserts=upserts,
        removals=tuple(edit.removals),
        repoints=repoints,
        version=None if fit is None else new_version(fit, *left),
        promote=fit is not None and fit.decision.promote,
        answer_accuracy=subject.terms.answer_accuracy,
        weights=subject.terms.weights,
        fallback=edit.live if fit is None else fit.decision.fallback,
        restores=edit.live is not None,
        standing=None if state is None or (fit is None and edit.live is None) else state.adapter.standing,
    )


def new_version(fit: Fit, head: Artifact, evidence: Artifact) -> NewVersion:
    """Return the version to record for a fit whose files are published."""
    return NewVersion(LINEAR_PROBE, head, evidence, fit.report, len(fit.head.labels))
