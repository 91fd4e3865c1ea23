"""Changes to kept examples: correction, exclusion and removal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from adapters.adaptation.adapt import AdaptPipeline
from adapters.adaptation.commands import ExampleEdit, RevisionResult
from adapters.adaptation.options import terms_of
from adapters.adaptation.promotion.decision import Promote
from adapters.adaptation.repository import AdapterRepository, AdapterSnapshot
from adapters.adaptation.revision.files import AdapterContext
from adapters.adaptation.revision.writer import RevisionWriter
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
from adapters.registry.records import ExampleRecord
from models.arrays import Floats
from models.preprocess.limits import InputError


@dataclass(frozen=True, slots=True)
class Feedback:
    """The right target of an input, or of the kept example with this id."""

    target: object
    input: bytes | str | InputError | None = None  # needed without an id
    id: str | None = None
    promote: Promote = "if_better"
    fit: bool = True
    # These two are for new examples only, see Dataset. A corrected example keeps its own values.
    group: str | None = None
    sampled: bool = False


@dataclass(frozen=True, slots=True)
class Amendment:
    """Changes to a kept example; None leaves a value as it is."""

    target: object | None = None
    excluded: bool | None = None  # True sets the example aside, False takes it back
    group: str | None = None  # the new group, "" for none
    promote: Promote = "if_better"
    fit: bool = True


class ExampleEditor:
    """Corrects, sets aside and removes examples, and refits each time. For one event loop."""

    def __init__(self, pipeline: AdaptPipeline) -> None:
        self._embedder = pipeline.embedder
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
        by_backbone: dict[str, dict[str, Floats]] = {}

        def timed(revised: RevisionResult) -> RevisionResult:
            return revised.with_total(started)

        async def step(state: AdapterSnapshot | None) -> RevisionResult:
            if state is None:
                raise UnknownAdapter(name)
            terms = terms_of(state.adapter)
            self._embedder.check_served(terms)
            upserts = _corrections(state, feedback)
            # Another process may rebase the adapter before the step is repeated.
            vectors = by_backbone.setdefault(terms.fingerprint, {})
            known = {one.digest for one in state.examples} | vectors.keys()
            new = await self._embedder.embed_new(tenant, terms, upserts, known)
            _raise_first(new.rejected)
            vectors.update(new.vectors)
            truncated = await self._embedder.count_truncated(tenant, terms, upserts, new)

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

        return (await self._writer.in_turn(tenant, name, step)).with_total(started)


def _corrections(state: AdapterSnapshot, feedback: Feedback) -> list[ValidExample]:
    """Return the examples to write for the feedback."""
    task, kind = state.adapter.task, state.adapter.kind
    if feedback.id is not None:
        return [_amended(state, feedback.id, Amendment(feedback.target, excluded=False), required=True)]
    assert feedback.input is not None
    posted = PostedExample(feedback.input, feedback.target, group=feedback.group, sampled=feedback.sampled)
    labels = label_set(task, [one.target for one in state.in_use]) | state.adapter.meanings.keys()
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
    labels |= state.adapter.meanings.keys()
    _raise_first(drop_collisions([amended], task, labels)[1])
    return amended


def _kept_as(record: ExampleRecord, target: Target) -> ValidExample:
    """Return the kept example, in use, with this target."""
    return ValidExample(record.id, record.digest, target, None, 0, record.group, record.sampled)


def _raise_first(rejected: Sequence[RejectedExample]) -> None:
    for one in rejected:
        refusal = InputError if one.field in ("image", "text") else ExampleError
        raise refusal(one.code, one.detail)
