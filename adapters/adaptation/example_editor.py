"""Changes to kept examples: correction, exclusion, removal, and the move to another backbone."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from adapters.adaptation.adapt import AdaptPipeline, no_known_tokens, terms_of
from adapters.adaptation.commands import ExampleEdit, RevisionResult
from adapters.adaptation.layout import PlannedExample
from adapters.adaptation.promotion.decision import Promote
from adapters.adaptation.publication import Publication
from adapters.adaptation.repository import AdapterRepository, AdapterSnapshot
from adapters.adaptation.revision import RevisionWriter
from adapters.adaptation.revision_files import AdapterContext, new_version
from adapters.examples.target import ExampleError, Target, label_set, normalise_target
from adapters.examples.validation import (
    PostedExample,
    RejectedExample,
    ValidExample,
    admit,
    check_group,
    drop_collisions,
)
from adapters.registry.errors import UnknownAdapter, UnknownExample
from adapters.registry.idempotency import PendingReply
from adapters.registry.records import Change, ExampleRecord, Rebase, Repoint
from adapters.storage.artifact import Artifact
from adapters.storage.formats import encode_embeddings, encode_evidence
from models.arrays import Floats
from models.errors import Conflict
from models.preprocess.limits import InputError


class InputsNotKept(Conflict):
    """The adapter does not have its inputs, so they cannot be embedded again."""

    code = "inputs_not_kept"


@dataclass(frozen=True, slots=True)
class Feedback:
    """The right target of an input, or of the kept example with this id.

    `group`, `sampled`: of a new example, see Dataset. A corrected example keeps its own.
    """

    target: object
    input: bytes | str | InputError | None = None
    id: str | None = None
    promote: Promote = "if_better"
    fit: bool = True
    group: str | None = None
    sampled: bool = False


@dataclass(frozen=True, slots=True)
class Amendment:
    """Changes to a kept example; None leaves a value as it is.

    `excluded`: set the example aside, or take it back. `group`: the new group, or "" for none.
    """

    target: object | None = None
    excluded: bool | None = None
    group: str | None = None
    promote: Promote = "if_better"
    fit: bool = True


class ExampleEditor:
    """Corrects, sets aside, removes and moves examples, and refits each time. For one event loop."""

    def __init__(self, pipeline: AdaptPipeline) -> None:
        self._pipeline = pipeline
        self._writer: RevisionWriter = pipeline.writer
        self._repository: AdapterRepository = pipeline.writer.repository

    async def feedback(
        self, tenant: str, name: str, feedback: Feedback, reply: PendingReply[RevisionResult] | None = None
    ) -> RevisionResult:
        """Correct the kept examples with the same input or with the id; a new input becomes a new example.

        `reply`: recorded in the same transaction. Raises UnknownAdapter, UnknownExample, ExampleError,
        InputError, and what RevisionWriter.revise raises.
        """
        started = time.perf_counter()
        vectors: dict[str, Floats] = {}

        def timed(revised: RevisionResult) -> RevisionResult:
            return _timed(revised, started)

        async def step(state: AdapterSnapshot | None) -> RevisionResult:
            if state is None:
                raise UnknownAdapter(name)
            terms = terms_of(state.adapter)
            self._pipeline.check_served(terms)
            upserts = _corrections(state, feedback)
            known = {one.digest for one in state.examples} | vectors.keys()
            new = await self._pipeline.embed_new(tenant, terms, upserts, known)
            _raise_first(new.rejected)
            vectors.update(new.vectors)
            truncated = await self._pipeline.count_truncated(tenant, terms, upserts, new)

            def whole(revised: RevisionResult) -> RevisionResult:
                return replace(revised, truncated=truncated)

            def told(revised: RevisionResult) -> RevisionResult:
                return timed(whole(revised))

            edit = ExampleEdit(upserts, promote=feedback.promote, fit=feedback.fit)
            subject = AdapterContext.of(tenant, name, terms, state)
            revised = await self._writer.revise(subject, edit, vectors, reply=reply and reply.of(told))
            return whole(revised)

        return timed(await self._writer.in_turn(tenant, name, step))

    async def amend(
        self,
        tenant: str,
        name: str,
        example: str,
        amendment: Amendment,
        reply: PendingReply[RevisionResult] | None = None,
    ) -> RevisionResult:
        """Apply the amendment to the kept example, and fit.

        `reply`: recorded in the same transaction. Raises UnknownAdapter, UnknownExample, ExampleError, and
        what RevisionWriter.revise raises.
        """

        async def step(state: AdapterSnapshot | None) -> RevisionResult:
            if state is None:
                raise UnknownAdapter(name)
            edit = ExampleEdit(
                [_amended(state, example, amendment)], promote=amendment.promote, fit=amendment.fit
            )
            subject = AdapterContext.of(tenant, name, terms_of(state.adapter), state)
            return await self._writer.revise(subject, edit, {}, reply=reply)

        return await self._writer.in_turn(tenant, name, step)

    async def remove(self, tenant: str, name: str, ids: Sequence[str] | None) -> RevisionResult:
        """Erase examples, or all of them if `ids` is None, and the versions that were fitted on them.

        If a version was live, the remaining examples are fitted again; if that is impossible, no version is
        live any more. Raises UnknownAdapter, UnknownExample, and what RevisionWriter.revise raises.
        """
        started = time.perf_counter()

        async def step(state: AdapterSnapshot | None) -> RevisionResult:
            if state is None:
                raise UnknownAdapter(name)
            kept = {one.id for one in state.examples}
            chosen = sorted(kept if ids is None else set(ids))
            for example in chosen:
                if example not in kept:
                    raise UnknownExample(example)
            edit = ExampleEdit(removals=chosen, fit=state.adapter.live is not None, required=False)
            return await self._writer.revise(
                AdapterContext.of(tenant, name, terms_of(state.adapter), state), edit, {}
            )

        return _timed(await self._writer.in_turn(tenant, name, step), started)

    async def rebase(self, tenant: str, name: str, backbone: str, promote: Promote) -> RevisionResult:
        """Move the adapter to another backbone of its kind: embed the kept inputs again, and fit.

        Raises UnknownAdapter, UnknownBackbone, InputError (wrong_kind), InputsNotKept, and what Batcher.embed
        and RevisionWriter.fit raise.
        """
        started = time.perf_counter()

        async def step(state: AdapterSnapshot | None) -> RevisionResult:
            if state is None:
                raise UnknownAdapter(name)
            return await self._rebase(state, backbone, promote)

        return _timed(await self._writer.in_turn(tenant, name, step), started)

    async def _rebase(self, state: AdapterSnapshot, backbone: str, promote: Promote) -> RevisionResult:
        spec = self._pipeline.spec(backbone)
        adapter = state.adapter
        if spec.kind != adapter.kind:
            raise InputError(
                "wrong_kind", f"The adapter takes {adapter.kind}s, and {backbone!r} {spec.kind}s."
            )
        if not adapter.keep_inputs or any(one.inputs is None for one in state.examples):
            raise InputsNotKept(
                "This adapter does not have all its inputs. Teach a new adapter on the other backbone."
            )
        terms = replace(terms_of(adapter), backbone=backbone, fingerprint=spec.fingerprint)
        segments, truncated = await self._embed_again(state, backbone)
        rows = [PlannedExample.of(one, one) for one in state.in_use]
        embeddings = np.stack([segments[one.segment][one.row] for one in state.in_use or state.examples])
        timings: dict[str, float] = {}
        fit = await self._writer.fit(
            adapter, terms, rows, embeddings, promote, timings, tenant=adapter.tenant
        )
        encoders = [partial(encode_embeddings, array, spec.fingerprint) for array in segments.values()]
        async with Publication(self._repository, adapter.tenant, adapter.uid) as publication:
            *moved, head, evidence = await publication.publish(
                [*encoders, fit.head.to_bytes, partial(encode_evidence, fit.evidence)]
            )
            change = Change(
                tenant=adapter.tenant,
                name=adapter.name,
                uid=adapter.uid,
                revision=state.revision,
                rebase=Rebase(backbone, spec.fingerprint),
                repoints=_repoints(state.examples, dict(zip(segments, moved, strict=True))),
                version=new_version(fit, head, evidence),
                promote=fit.decision.promote,
                standing=adapter.standing,
            )
            committed = await publication.commit(change)
        await self._writer.warm(committed, fit)
        return RevisionResult(committed, fit.decision, timings, truncated)

    async def _embed_again(self, state: AdapterSnapshot, backbone: str) -> tuple[dict[Artifact, Floats], int]:
        """Return the embeddings of every kept segment by the other backbone, rows in their places.

        Also returns how many of the examples are texts of which that backbone reads only the start. Raises
        InputError for an example that it cannot take, or of which it knows no token.
        """
        rows: dict[Artifact, set[int]] = defaultdict(set)
        inputs: dict[Artifact, Artifact] = {}
        for one in state.examples:
            assert one.inputs is not None
            rows[one.segment].add(one.row)
            inputs[one.segment] = one.inputs
        segments: dict[Artifact, Floats] = {}
        truncated = 0
        for segment, source in inputs.items():
            values = await self._repository.inputs(state.adapter, source)
            batcher = self._pipeline.batchers[backbone]
            embedded = await batcher.embed(values, bulk=True, source=state.adapter.tenant)
            for row in rows[segment] & embedded.errors.keys():
                raise embedded.errors[row]
            if rows[segment] & embedded.unknown:
                unknown = next(
                    one.id for one in state.examples if one.segment == segment and one.row in embedded.unknown
                )
                raise no_known_tokens(backbone, f"the example {unknown!r}")
            segments[segment] = embedded.embeddings
            truncated += len(rows[segment] & embedded.truncated)
        return segments, truncated


def _timed(done: RevisionResult, started: float) -> RevisionResult:
    """Return the result with the seconds since `started` as the total."""
    return replace(done, timings={**done.timings, "total": time.perf_counter() - started})


def _corrections(state: AdapterSnapshot, feedback: Feedback) -> list[ValidExample]:
    """Return the examples to write for the feedback."""
    task, kind = state.adapter.task, state.adapter.kind
    if feedback.id is not None:
        return [_amended(state, feedback.id, Amendment(feedback.target, excluded=False), required=True)]
    assert feedback.input is not None
    posted = PostedExample(feedback.input, feedback.target, group=feedback.group, sampled=feedback.sampled)
    labels = label_set(task, [one.target for one in state.in_use])
    admitted, rejected = admit([posted], task=task, kind=kind, known_labels=labels)
    _raise_first(rejected)
    (example,) = admitted
    same = [one for one in state.examples if one.digest == example.digest]
    used = [one for one in same if not one.excluded]
    # Feedback is learned even if all examples of the input are set aside: it takes them back.
    return [_kept_as(one, example.target) for one in used or same] or [example]


def _amended(
    state: AdapterSnapshot, example: str, amendment: Amendment, *, required: bool = False
) -> ValidExample:
    """Return the kept example with the amendment applied. `required`: the target may not be missing.

    Raises UnknownExample, ExampleError.
    """
    record = next((one for one in state.examples if one.id == example), None)
    if record is None:
        raise UnknownExample(example)
    task = state.adapter.task
    target = record.target
    if required or amendment.target is not None:
        target = normalise_target(task, amendment.target)
    if amendment.group:
        check_group(amendment.group)
    amended = _kept_as(record, target)
    if amendment.group is not None:
        amended = replace(amended, group=amendment.group or None)
    if record.excluded if amendment.excluded is None else amendment.excluded:
        return replace(amended, excluded=True)
    labels = label_set(task, [one.target for one in state.in_use if one.id != example])
    _raise_first(drop_collisions([amended], task, labels)[1])
    return amended


def _kept_as(record: ExampleRecord, target: Target) -> ValidExample:
    """Return the kept example, in use, with this target."""
    return ValidExample(record.id, record.digest, target, None, 0, record.group, record.sampled)


def _raise_first(rejected: Sequence[RejectedExample]) -> None:
    for one in rejected:
        refusal = InputError if one.field in ("image", "text") else ExampleError
        raise refusal(one.code, one.detail)


def _repoints(examples: Sequence[ExampleRecord], moved: Mapping[Artifact, Artifact]) -> tuple[Repoint, ...]:
    return tuple(Repoint(one.id, moved[one.segment], one.row, one.inputs) for one in examples)
