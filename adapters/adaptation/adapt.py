"""The adapt pipeline: examples in, a new version out."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial

from adapters.adaptation.commands import (
    AdaptCommand,
    AdaptOutcome,
    ContractChanged,
    ExampleEdit,
    ExamplesRejected,
    NothingToFit,
    RevisionResult,
    _blamed,
)
from adapters.adaptation.input_embedder import BatchEmbedder, InputEmbedder
from adapters.adaptation.options import terms_of, with_options
from adapters.adaptation.publication import BackgroundPublish, published_early
from adapters.adaptation.repository import AdapterSnapshot
from adapters.adaptation.revision.files import AdapterContext
from adapters.adaptation.revision.layout import plan_change
from adapters.adaptation.revision.writer import RevisionWriter
from adapters.examples.target import label_set
from adapters.examples.validation import RejectedExample, ValidExample, admit, common_kind
from adapters.registry.errors import UnknownAdapter
from adapters.registry.idempotency import PendingReply
from adapters.registry.records import Creation
from adapters.storage.formats import encode_inputs
from models.spec import Kind, UnknownBackbone

# Inputs of at least this total size (bytes; characters of texts) are published while they are embedded.
_PUBLISHED_AHEAD = 1 << 20


@contextmanager
def telling_rejected(rejected: Sequence[RejectedExample]) -> Iterator[None]:
    """Add the rejected examples to an error raised in the block, since they may be its cause.

    They become its `rejected` and `errors`, as in ExamplesRejected, and its `detail` says how many there are.
    """
    try:
        yield
    except Exception as error:
        detail = getattr(error, "detail", None) or str(error)
        if rejected and isinstance(detail, str) and not isinstance(error, ExamplesRejected):
            also = f"{len(rejected)} examples were rejected as well; `errors` says why."
            error.args = (f"{detail} {also}",)
            vars(error).update(rejected=tuple(rejected), errors=_blamed(rejected))
        raise


class _OtherTerms(Exception):
    """The adapter no longer has the task or the backbone that the examples were checked and embedded for."""


class AdaptPipeline:
    """Validates examples, embeds new inputs and has the adapter revised. For one event loop.

    `count(outcome)` is called once per adapt with promoted, withheld, stored, cancelled or the code of the
    error.
    """

    def __init__(
        self,
        writer: RevisionWriter,
        batchers: Mapping[str, BatchEmbedder],
        count: Callable[[str], None] = lambda outcome: None,
    ) -> None:
        self.writer = writer
        self.embedder = InputEmbedder(writer.repository, batchers)
        self._count = count

    async def adapt(
        self, tenant: str, command: AdaptCommand, reply: PendingReply[AdaptOutcome] | None = None
    ) -> AdaptOutcome:
        """Teach the adapter, creating it on first use. All or nothing: an error leaves no trace.

        `reply`: recorded in the same transaction; its timings cover only the time spent until then.

        Raises ExamplesRejected, what `terms` and LabelNameEmbedder.check raise, and what Batcher.embed and
        RevisionWriter.revise raise. If cancelled, either nothing is recorded or all of it.
        """
        outcome = "cancelled"
        try:
            done = await self._adapt(tenant, command, reply)
            outcome = (
                "stored" if done.revised.version is None else "promoted" if done.revised.live else "withheld"
            )
            return done
        except Exception as error:
            outcome = getattr(error, "code", "internal_error")
            raise
        finally:
            self._count(outcome)

    async def _adapt(
        self, tenant: str, command: AdaptCommand, reply: PendingReply[AdaptOutcome] | None
    ) -> AdaptOutcome:
        started = time.perf_counter()
        while True:
            # Another request may rebase the adapter meanwhile, or create it with other terms.
            with suppress(_OtherTerms):
                return await self._attempt(tenant, command, reply, started)

    async def _attempt(
        self, tenant: str, command: AdaptCommand, reply: PendingReply[AdaptOutcome] | None, started: float
    ) -> AdaptOutcome:
        """Adapt the adapter with the terms that it has now. Raises _OtherTerms."""
        async with self.writer.place(tenant):
            seen = await self.writer.repository.state(tenant, command.adapter)
            terms = self.terms(command, seen)
            if command.meanings:
                await self.writer.names.check(terms)
            admitted, rejected, fresh = await self.writer.repository.aside(
                tenant, lambda: _admit(command, terms, seen)
            )
        if command.strict and rejected:
            raise ExamplesRejected(rejected, strict=True)
        subject = AdapterContext.of(tenant, command.adapter, terms, seen)
        async with self._ahead(subject, fresh) as ahead:
            known = {one.digest for one in subject.examples}
            async with self.writer.place(tenant):
                new = await self.embedder.embed_new(tenant, terms, admitted, known)
                vectors, timings = new.vectors, new.timings
                rejected = sorted([*rejected, *new.rejected], key=lambda one: one.index)
                failed = {one.index for one in new.rejected}
                usable = [one for one in admitted if one.index not in failed]
                if rejected and (command.strict or not usable):
                    raise ExamplesRejected(rejected, strict=command.strict)
                truncated = await self.embedder.count_truncated(tenant, terms, usable, new)

            def outcome(revised: RevisionResult) -> AdaptOutcome:
                total = time.perf_counter() - started
                revised = replace(revised, truncated=truncated)
                return AdaptOutcome(revised, rejected, {**timings, **revised.timings, "total": total})

            async def step(state: AdapterSnapshot | None) -> RevisionResult:
                now = self.terms(command, state)
                if (now.task, now.fingerprint) != (terms.task, terms.fingerprint):
                    raise _OtherTerms
                # Inputs that the adapter had at first may have been removed meanwhile.
                known = vectors.keys() | ({one.digest for one in state.examples} if state else set())
                vectors.update((await self.embedder.embed_new(tenant, now, usable, known)).vectors)
                edit = ExampleEdit(
                    usable,
                    clear=command.update == "replace",
                    fit=command.fit,
                    promote=command.promote,
                    uploaded=command.uploaded,
                )
                context = AdapterContext.of(tenant, command.adapter, now, state, subject.uid)
                return await self.writer.revise(context, edit, vectors, ahead, reply and reply.of(outcome))

            with telling_rejected(rejected):
                return outcome(await self.writer.in_turn(tenant, command.adapter, step, seen))

    @asynccontextmanager
    async def _ahead(
        self, subject: AdapterContext, fresh: Sequence[ValidExample]
    ) -> AsyncIterator[BackgroundPublish | None]:
        """Publish large inputs while they are embedded, so that the request does not wait for the disk."""
        inputs = [one.input for one in fresh if one.input is not None]
        if not subject.terms.keep_inputs or sum(map(len, inputs)) < _PUBLISHED_AHEAD:
            yield None
            return
        digests = [one.digest for one in fresh]
        encode = partial(encode_inputs, inputs)
        repository = self.writer.repository
        async with published_early(repository, subject.tenant, subject.uid, digests, encode) as ahead:
            yield ahead

    def terms(self, command: AdaptCommand, state: AdapterSnapshot | None) -> Creation:
        """Return the settings fixed at the adapter's creation, or those that the command creates it with.

        Options are the command's, if it has any. Raises ContractChanged, WeightsNotForTask,
        LabelsNotForTask, FingerprintMismatch, UnknownBackbone, MixedInputs, UnknownAdapter.
        """
        if state is None:
            return self._new_terms(command)
        terms = with_options(terms_of(state.adapter), command.options)
        if command.backbone not in (None, terms.backbone):
            self.embedder.spec(command.backbone or "")
            raise ContractChanged(
                "backbone_changed",
                f"The adapter uses {terms.backbone!r}. POST /adapters/{{adapter}}/rebase moves it "
                "to another.",
            )
        if command.task not in (None, terms.task):
            raise ContractChanged("task_changed", f"The adapter's task is {terms.task}; use another adapter.")
        if command.keep_inputs not in (None, terms.keep_inputs):
            kept = "keeps" if terms.keep_inputs else "does not keep"
            raise ContractChanged("keep_inputs_changed", f"The adapter {kept} inputs; use another adapter.")
        self.embedder.check_served(terms)
        return terms

    def _new_terms(self, command: AdaptCommand) -> Creation:
        if not command.posted and not command.meanings:
            raise UnknownAdapter(command.adapter)
        name = command.backbone or self._default(_kind_of(command))
        spec = self.embedder.spec(name)
        terms = Creation(
            backbone=name,
            fingerprint=spec.fingerprint,
            kind=spec.kind,
            task=command.task or "classification",
            keep_inputs=True if command.keep_inputs is None else command.keep_inputs,
            began=command.began,
        )
        return with_options(terms, command.options)

    def _default(self, kind: Kind | None) -> str:
        for name, batcher in self.embedder.batchers.items():
            if kind in (None, batcher.backbone.spec.kind):
                return name
        raise UnknownBackbone(
            f"The service has no backbone for {kind}s. GET /backbones lists those that it serves."
        )


def _kind_of(command: AdaptCommand) -> Kind | None:
    """Return the kind of the posted examples; without any, names teach the adapter, and they are texts."""
    return common_kind(one.input for one in command.posted) if command.posted else "text"


def _admit(
    command: AdaptCommand, terms: Creation, state: AdapterSnapshot | None
) -> tuple[list[ValidExample], list[RejectedExample], Sequence[ValidExample]]:
    """Return the valid and the rejected examples, and those whose inputs are stored if all can be read."""
    if not command.posted and command.update == "replace":
        raise NothingToFit(
            "With `update` replace and no examples, nothing is left to fit. Delete the examples instead."
        )
    before = () if state is None or command.update == "replace" else state.in_use
    if command.uploaded is not None:
        before = tuple(one for one in before if one.id in command.uploaded)
    known = label_set(terms.task, [one.target for one in before]) | terms.meanings.keys()
    admitted, rejected = admit(command.posted, task=terms.task, kind=terms.kind, known_labels=known)
    kept = () if state is None else state.examples
    plan = plan_change(kept, admitted, clear=command.update == "replace")
    return admitted, rejected, plan.fresh
