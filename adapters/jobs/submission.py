"""Checks and queues jobs, which the worker then runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Final

from adapters.adaptation.adapt import AdaptPipeline, telling_rejected
from adapters.adaptation.commands import AdaptCommand, AdaptOutcome
from adapters.adaptation.options import check_costs
from adapters.adaptation.publication import Publication
from adapters.adaptation.rebase import InputsNotKept
from adapters.adaptation.repository import AdapterRepository
from adapters.examples.meanings import check_spelling
from adapters.examples.target import Target, label_set
from adapters.examples.upload import BadUpload
from adapters.examples.upload_forms import Beginning, Form, look_at
from adapters.examples.validation import TARGET_FIELDS, PostedExample
from adapters.finetune.config import FineTuneConfig
from adapters.jobs.callbacks import check_callback
from adapters.registry.errors import AdapterExists, RegistryUnavailable, TooManyJobs, UnknownAdapter
from adapters.registry.idempotency import PendingReply
from adapters.registry.jobs import upload_of, upload_request
from adapters.registry.records import AdapterRecord, Change, Creation, ExampleRecord, JobKind, JobRecord
from adapters.registry.registry import new_uid
from adapters.threads import DATABASE
from adapters.turns import Gate
from models.errors import CodedError, Conflict, Invalid
from models.spec import BackboneSpec

FINE_TUNE: Final = "fine_tune"
BULK: Final = "bulk_adapt"
# Fewest examples for a fine-tune, in all and per label. Fewer leave too few to hold out for measuring it.
FEWEST_EXAMPLES = 50
FEWEST_OF_A_LABEL = 5
Submitted = tuple[JobRecord, AdaptOutcome | None]
"""A job, and the outcome of storing the examples that were sent with it."""
_PUBLISHED_AT_ONCE = 4  # parts of uploads that are published at the same time
_PART_BYTES = 4 << 20  # size of a part; every open upload holds one in memory


class CannotTune(CodedError, Conflict):
    """The adapter cannot be fine-tuned in its present state; `code` says why, the message what to do."""


class TooFewExamples(Invalid):
    """There are too few examples to train and to measure on."""

    code = "too_few_examples"


def check_tunable(adapter: AdapterRecord, terms: Creation, examples: Sequence[ExampleRecord]) -> None:
    """Raise InputsNotKept, CannotTune or TooFewExamples unless the adapter can be fine-tuned.

    Only examples that are `sampled` and not `excluded` count, since only they can be held out. `terms`: the
    adapter's, as the job asks; a label with a name needs examples as well.
    """
    examples = [example for example in examples if not example.excluded]
    if not adapter.keep_inputs:
        raise InputsNotKept("A fine-tune needs the inputs, and the adapter does not keep them.")
    if adapter.task != "classification":
        raise CannotTune(
            "task_not_tunable", f"Adapters for {adapter.task} cannot be fine-tuned yet. Use linear_probe."
        )
    sizes: Counter[Target] = Counter(dict.fromkeys(terms.meanings, 0))
    sizes.update({example.target: 0 for example in examples})
    sizes.update(example.target for example in examples if example.sampled)
    if sizes.total() < FEWEST_EXAMPLES or len(sizes) < 2 or min(sizes.values()) < FEWEST_OF_A_LABEL:
        raise TooFewExamples(
            f"A fine-tune needs {FEWEST_EXAMPLES} examples, of two labels or more, and "
            f"{FEWEST_OF_A_LABEL} of each, named ones included, besides those that are not `sampled`; a "
            "linear probe needs two. Send more.",
        )


def check_trainable(backbone: BackboneSpec) -> None:
    """Raise CannotTune if the backbone has no network that can be trained."""
    if not backbone.is_tunable:
        raise CannotTune(
            "backbone_not_tunable",
            f"The backbone {backbone.name!r} is an ONNX graph, which can be run and not trained. Use "
            "linear_probe, or rebase the adapter to a backbone with the weights of a timm or transformers "
            "network.",
        )


class JobSubmitter:
    """Queues, lists and cancels jobs. For one event loop.

    `max_open`: most jobs that a tenant may have queued or running. `deadline_seconds`: most seconds from a
    job's submission to its end.
    """

    def __init__(
        self,
        pipeline: AdaptPipeline,
        *,
        max_open: int,
        deadline_seconds: float,
        callback_urls: Sequence[str] = (),
    ) -> None:
        self._pipeline = pipeline
        self._callback_urls = callback_urls
        self._publishing = Gate(_PUBLISHED_AT_ONCE)
        self._repository: AdapterRepository = pipeline.writer.repository
        self._jobs = self._repository.registry.jobs
        self._max_open = max_open
        self._deadline_seconds = deadline_seconds

    async def fine_tune(
        self, tenant: str, command: AdaptCommand, reply: PendingReply[Submitted] | None = None
    ) -> Submitted:
        """Store the command's examples, if any, and queue a fine-tune on all kept examples.

        `reply`: recorded with the job. If only the examples were stored, a repeated request is safe: they get
        the same ids, and make no version.

        Raises what AdaptPipeline.adapt raises, and UnknownAdapter, CannotTune, TooFewExamples, InputsNotKept,
        LabelsInvalid, WeightsLabelUnknown, TooManyJobs, CallbackNotAllowed, AlreadyAnswered.
        """
        self._check_callback(command.callback)
        stored = None
        if command.posted:
            # The job applies the options together with its version.
            keep = replace(command, fit=False, answer_accuracy=None, weights=None, costs=None, meanings=None)
            stored = await self._pipeline.adapt(tenant, keep)
        state = await self._repository.state(tenant, command.adapter)
        if state is None:
            raise UnknownAdapter(command.adapter)
        terms = self._pipeline.terms(command, state)
        labels = label_set(terms.task, [one.target for one in state.examples])
        with telling_rejected(() if stored is None else stored.rejected):
            check_tunable(state.adapter, terms, state.examples)
            check_trainable(self._pipeline.embedder.spec(terms.backbone))
            if command.meanings:
                await self._pipeline.writer.names.check(terms)
                check_spelling(terms.meanings, labels)
            if command.costs:
                check_costs(command.costs, labels | terms.meanings.keys())
        request = {
            "promote": command.promote,
            "config": asdict(command.fine_tune or FineTuneConfig()),
            **command.options.to_json(),
        }

        def submitted(job: JobRecord) -> Submitted:
            return job, stored

        return submitted(
            await DATABASE.run(
                self._submission(tenant, command, FINE_TUNE, request, reply and reply.of(submitted))
            )
        )

    async def bulk(
        self,
        tenant: str,
        form: Form,
        command: AdaptCommand,
        body: AsyncIterator[bytes],
        reply: PendingReply[JobRecord] | None = None,
    ) -> JobRecord:
        """Store an upload, creating the adapter on first use, and queue a job that learns from it.

        The command has no examples of its own. Tenants take turns in publishing parts, and a slow upload
        delays no other. `reply`: recorded with the job. Raises BadUpload, TooManyJobs, CallbackNotAllowed,
        AlreadyAnswered, and what AdaptPipeline.terms, the store and the registry raise. After an error the
        upload is deleted, or swept later.
        """
        self._check_callback(command.callback)
        await self._check_open(tenant)
        parts = _parts(body)
        part = await anext(parts, b"")
        if not part:
            raise BadUpload("no_examples", "The upload is empty.")
        adapter = await self._adapter(tenant, command, look_at(form, part, command.columns))
        async with Publication(self._repository, tenant, adapter.uid) as publication:
            while part:
                async with self._publishing.passed(tenant):
                    await publication.publish([partial(bytes, part)])
                part = await anext(parts, b"")
            request = {
                "form": form,
                "upload": upload_request(publication.files),
                "update": command.update,
                "promote": command.promote,
                "fit": command.fit,
                **command.options.to_json(),
                "columns": dict(command.columns),
            }
            return await publication.record(self._submission(tenant, command, BULK, request, reply))

    async def _adapter(self, tenant: str, command: AdaptCommand, beginning: Beginning) -> AdapterRecord:
        """Return the adapter, created without examples if it is missing. It stays when the upload fails."""
        state = await self._repository.state(tenant, command.adapter)
        # An example of the upload's kind selects the backbone if the command does not name one.
        something = PostedExample("" if beginning.kind == "text" else b"")
        terms = self._pipeline.terms(replace(command, posted=(something,)), state)
        wanted = TARGET_FIELDS[terms.task]
        if beginning.target not in (None, wanted):
            raise BadUpload(
                "invalid_csv",
                f"The task {terms.task} needs the column {wanted!r}, and not {beginning.target!r}. "
                f"If it has another name, say which one it is: {wanted}_column=…",
            )
        if state is not None:
            return state.adapter
        change = Change(tenant, command.adapter, new_uid(), 0, create=terms)
        try:
            return (await self._repository.commit(change)).adapter
        except AdapterExists:
            return await self._adapter(tenant, command, beginning)

    def _submission(
        self,
        tenant: str,
        command: AdaptCommand,
        kind: JobKind,
        request: Mapping[str, Any],
        reply: PendingReply[JobRecord] | None,
    ) -> Callable[[], JobRecord]:
        """Return what queues the job: a transaction, for a thread."""
        if command.callback is not None:
            request = {**request, "callback": command.callback}
        return partial(
            self._jobs.submit,
            tenant,
            command.adapter,
            kind,
            request,
            deadline_seconds=self._deadline_seconds,
            max_open=self._max_open,
            reply=reply,
        )

    async def _check_open(self, tenant: str) -> None:
        """Raise TooManyJobs before the upload is read, if the newest jobs show that it would be refused."""
        newest = await DATABASE.run(self._jobs.jobs, tenant, limit=2 * self._max_open)
        if sum(job.finished_at is None for job in newest) >= self._max_open:
            raise TooManyJobs(f"{self._max_open} jobs may be queued or running at once; wait for one to end.")

    def _check_callback(self, url: str | None) -> None:
        if url is not None:
            check_callback(url, self._callback_urls)

    async def job(self, tenant: str, job_id: str) -> JobRecord:
        """Return one job. Raises UnknownJob.

        If the job made a version, this process refreshes the adapter's alias, so that predictions use a live
        version from then on, or once its network is loaded.
        """
        job = await DATABASE.run(self._jobs.job, tenant, job_id)
        if job.version is not None:
            with suppress(UnknownAdapter, RegistryUnavailable):
                adapter = await DATABASE.run(self._repository.registry.adapter, tenant, job.adapter)
                await self._repository.aliases.get(tenant, job.adapter, min_epoch=adapter.epoch)
        return job

    async def jobs(
        self, tenant: str, adapter: str | None, after: str | None, limit: int
    ) -> Sequence[JobRecord]:
        """Return the tenant's jobs, newest first."""
        return await DATABASE.run(self._jobs.jobs, tenant, adapter, after, limit)

    async def cancel(self, tenant: str, job_id: str) -> JobRecord:
        """Cancel a queued job; a running one ends within seconds. Raises UnknownJob, JobFinished."""
        job = await DATABASE.run(self._jobs.request_cancel, tenant, job_id)
        if job.state == "cancelled":
            await self._repository.delete_files(tenant, job.adapter_uid, upload_of(job.request))
        return job


async def _parts(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the body in parts of _PART_BYTES, the last one shorter."""
    part = bytearray()
    async for chunk in body:
        part += chunk
        while len(part) >= _PART_BYTES:
            yield bytes(part[:_PART_BYTES])
            del part[:_PART_BYTES]
    if part:
        yield bytes(part)
