"""The data of a revision: embeddings gathered from their segments, and the files to publish."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from adapters.adaptation.commands import ExampleEdit
from adapters.adaptation.promotion.decision import Decision
from adapters.adaptation.publication import Publication
from adapters.adaptation.repository import AdapterRepository, AdapterSnapshot
from adapters.adaptation.revision.layout import LayoutPlan, SegmentSlot, Stored, locate
from adapters.heads.head import Head
from adapters.registry.records import AdapterRecord, Change, Creation, ExampleRecord, NewVersion
from adapters.registry.registry import new_uid
from adapters.storage.artifact import Artifact, Buffer
from adapters.storage.formats import Evidence, encode_embeddings, encode_evidence, encode_inputs
from models.arrays import Floats

Encode = Callable[[], Buffer]
LINEAR_PROBE = "linear_probe"


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted head with its evidence, report and promotion decision."""

    head: Head
    evidence: Evidence
    report: Mapping[str, Any]
    decision: Decision


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


@dataclass(frozen=True, slots=True)
class RevisionFiles:
    """The published files of one revision; None for those that it does not have."""

    embeddings: Artifact | None = None  # of the new examples
    inputs: Artifact | None = None  # of the new examples, if inputs are kept
    head: Artifact | None = None
    evidence: Artifact | None = None
    rewritten: tuple[SegmentSlot, ...] = ()  # first slot of each of the plan's bundles, in its order

    @property
    def start(self) -> SegmentSlot | None:
        """The first slot of the new examples."""
        return None if self.embeddings is None else SegmentSlot(self.embeddings, 0, self.inputs)


def new_files(
    subject: AdapterContext, plan: LayoutPlan, fresh: Mapping[str, Floats], fit: Fit | None
) -> dict[str, Encode]:
    """Return how the new files of a revision are encoded, by their names in RevisionFiles."""
    files: dict[str, Encode] = {}
    if plan.fresh:
        new = np.stack([fresh[example.digest] for example in plan.fresh])
        files["embeddings"] = partial(encode_embeddings, new, subject.terms.fingerprint)
        if subject.terms.keep_inputs:
            inputs = [example.input for example in plan.fresh if example.input is not None]
            files["inputs"] = partial(encode_inputs, inputs)
    if fit is not None:
        files["head"] = fit.head.to_bytes
        files["evidence"] = partial(encode_evidence, fit.evidence)
    return files


async def publish_bundle(
    repository: AdapterRepository, publication: Publication, subject: AdapterContext, bundle: Sequence[Stored]
) -> SegmentSlot:
    """Publish the examples of a bundle in files of their own; return the first one's slot."""
    assert subject.adapter is not None
    moved = await repository.embeddings(subject.adapter, bundle)
    encoders: list[Encode] = [partial(encode_embeddings, moved, subject.terms.fingerprint)]
    if bundle[0].inputs is not None:
        encoders.append(partial(encode_inputs, await kept_inputs(repository, subject.adapter, bundle)))
    segment, *inputs = await publication.publish(encoders)
    return SegmentSlot(segment, 0, inputs[0] if inputs else None)


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


def change_of(
    subject: AdapterContext,
    edit: ExampleEdit,
    plan: LayoutPlan,
    files: RevisionFiles,
    fit: Fit | None,
) -> Change:
    """The change that a revision commits: its examples with their places, and its version."""
    upserts, repoints = locate(plan, files.start, files.rewritten)
    version = None
    if fit is not None:
        assert files.head is not None
        assert files.evidence is not None
        version = new_version(fit, files.head, files.evidence)
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
        version=version,
        promote=fit is not None and fit.decision.promote,
        answer_accuracy=subject.terms.answer_accuracy,
        weights=subject.terms.weights,
        meanings=subject.terms.meanings,
        costs=subject.terms.costs,
        fallback=edit.live if fit is None else fit.decision.fallback,
        restores=edit.live is not None,
        standing=None if state is None or (fit is None and edit.live is None) else state.adapter.standing,
    )


def new_version(fit: Fit, head: Artifact, evidence: Artifact) -> NewVersion:
    """Return the version to record for a fit whose files are published."""
    return NewVersion(LINEAR_PROBE, head, evidence, fit.report, len(fit.head.labels))
