"""What becomes a job: checks that it can be done, and queues it. The work itself is the worker's."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final

from adapters.adaptation.adapt import AdaptCommand, AdaptOutcome, AdaptPipeline, telling_rejected
from adapters.adaptation.example_editor import InputsNotKept
from adapters.adaptation.repository import AdapterRepository
from adapters.completion import to_its_end
from adapters.examples.upload import BadUpload
from adapters.examples.upload_forms import Beginning, Form, look_at
from adapters.examples.validation import TARGET_FIELDS, PostedExample
from adapters.jobs.callbacks import check_callback
from adapters.processes.turns import Gate
from adapters.registry.idempotency import PendingReply
from adapters.registry.jobs import upload_of, upload_request
from adapters.registry.records import (
    AdapterExists,
    AdapterRecord,
    Change,
    ExampleRecord,
    JobKind,
    JobRecord,
    RegistryUnavailable,
    TooManyJobs,
    UnknownAdapter,
)
from adapters.registry.registry import new_uid
from adapters.storage.artifact import Artifact, StoreError

FINE_TUNE: Final = "fine_tune"
BULK: Final = "bulk_adapt"
# Fewer leave nothing to hold out that would say how good the network is.
FEWEST_EXAMPLES = 50
FEWEST_OF_A_LABEL = 5
Submitted = tuple[JobRecord, AdaptOutcome | None]
"""A job, and what became of the examples that were sent with it."""
# Parts of uploads that are written at once, and their size: every open upload has one in memory.
_PUBLISHED_AT_ONCE = 4
_PART_BYTES = 4 << 20


class CannotTune(RuntimeError):
    """The adapter cannot be fine-tuned as it is; `code` says why, the message what to do."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class TooFewExamples(CannotTune):
    """There is too little to learn from and to measure on."""


def check_tunable(adapter: AdapterRecord, examples: Sequence[ExampleRecord]) -> None:
    """Raises InputsNotKept, CannotTune or TooFewExamples unless a network can learn from the adapter.

    What is set aside does not count, nor what is not measured on: there would be nothing to hold out.
    """
    examples = [example for example in examples if not example.excluded]
    if not adapter.keep_inputs:
        raise InputsNotKept("The adapter keeps no inputs, and a network learns from them.")
    if adapter.task != "classification":
        raise CannotTune("task_not_tunable", f"Adapters of {adapter.task} cannot be fine-tuned yet.")
    sizes = Counter({example.target: 0 for example in examples})
    sizes.update(example.target for example in examples if example.sampled)
    if sizes.total() < FEWEST_EXAMPLES or len(sizes) < 2 or min(sizes.values()) < FEWEST_OF_A_LABEL:
        raise TooFewExamples(
            "too_few_examples",
            f"A fine-tune needs {FEWEST_EXAMPLES} examples, of two labels or more, and "
            f"{FEWEST_OF_A_LABEL} of each, besides those that are not `sampled`; a linear probe needs two. "
            "Send more.",
        )


class JobSubmitter:
    """Queues jobs and tells of them. For one event loop.

    max_open: jobs that a tenant may have queued and running. deadline_seconds: what a job may take from its
    submission on.
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
        """Keeps the command's examples, if it has any, and queues a fine-tune of all that is kept then.

        reply: recorded with the job. Where only the examples were kept, to keep them again changes nothing:
        they make no version, and have the same ids.

        Raises what AdaptPipeline.adapt raises, and UnknownAdapter, CannotTune, InputsNotKept, TooManyJobs,
        FingerprintMismatch, CallbackNotAllowed, AlreadyAnswered.
        """
        self._check_callback(command.callback)
        stored = None
        if command.posted:
            # What is wanted of answers changes with the version that answers so.
            keep = replace(command, fit=False, answer_accuracy=None, weights=None)
            stored = await self._pipeline.adapt(tenant, keep)
        state = await self._repository.state(tenant, command.adapter)
        if state is None:
            raise UnknownAdapter(command.adapter)
        with telling_rejected(() if stored is None else stored.rejected):
            check_tunable(state.adapter, state.examples)
        self._pipeline.check_served(state.adapter)
        request = {
            "promote": command.promote,
            "config": dict(command.fine_tune or {}),
            "answer_accuracy": command.answer_accuracy,
            "weights": command.weights,
        }

        def submitted(job: JobRecord) -> Submitted:
            return job, stored

        return submitted(
            await self._submit(tenant, command, FINE_TUNE, request, reply and reply.of(submitted))
        )

    async def bulk(
        self,
        tenant: str,
        form: Form,
        command: AdaptCommand,
        body: AsyncIterator[bytes],
        reply: PendingReply[JobRecord] | None = None,
    ) -> JobRecord:
        """Keeps an upload, creating its adapter on first use, and queues a job that learns from it.

        The command's own examples are none. Parts of uploads are published in turns by tenant, and what comes
        slowly delays no other upload. reply: recorded with the job. Raises BadUpload, TooManyJobs,
        CallbackNotAllowed, AlreadyAnswered, and what AdaptPipeline.terms, the store and the registry
        raise. The upload is deleted then, or swept later.
        """
        self._check_callback(command.callback)
        await self._check_open(tenant)
        parts = _parts(body)
        part = await anext(parts, b"")
        if not part:
            raise BadUpload("no_examples", "The upload is empty.")
        adapter = await self._adapter(tenant, command, look_at(form, part, command.columns))
        publishing: list[asyncio.Future[tuple[Artifact, ...]]] = []
        try:
            while part:
                async with self._publishing.passed(tenant):
                    publication = self._repository.publish(tenant, adapter.uid, [partial(bytes, part)])
                    publishing.append(asyncio.ensure_future(publication))
                    await asyncio.shield(publishing[-1])
                part = await anext(parts, b"")
        except BaseException:
            await to_its_end(self._let_go(tenant, adapter.uid, publishing))
            raise
        kept = [artifact for published in publishing for artifact in published.result()]
        queueing = self._queue(tenant, adapter.uid, form, command, kept, reply)
        return await to_its_end(queueing)

    async def _queue(
        self,
        tenant: str,
        uid: str,
        form: Form,
        command: AdaptCommand,
        kept: Sequence[Artifact],
        reply: PendingReply[JobRecord] | None,
    ) -> JobRecord:
        """The job of a kept upload, or the upload goes. To be run to its end, whoever hangs up meanwhile."""
        request = {
            "form": form,
            "upload": upload_request(kept),
            "update": command.update,
            "promote": command.promote,
            "fit": command.fit,
            "answer_accuracy": command.answer_accuracy,
            "weights": command.weights,
            "columns": dict(command.columns),
        }
        try:
            return await self._submit(tenant, command, BULK, request, reply)
        except RegistryUnavailable:
            # The job may be recorded all the same; if not, a sweep finds the upload.
            raise
        except Exception:
            await self._repository.drop(tenant, uid, kept)
            raise

    async def _let_go(
        self, tenant: str, uid: str, publishing: Sequence[asyncio.Future[tuple[Artifact, ...]]]
    ) -> None:
        """Deletes the parts of an upload that are published, and those that are being published."""
        for publication in publishing:
            # A store that failed has stored nothing, and whoever sent the upload has been told.
            with suppress(StoreError):
                await self._repository.drop(tenant, uid, await publication)

    async def _adapter(self, tenant: str, command: AdaptCommand, beginning: Beginning) -> AdapterRecord:
        """The adapter, created without examples if there is none; an upload that fails leaves it."""
        state = await self._repository.state(tenant, command.adapter)
        # Something of that kind, which names the backbone where the command does not.
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
            return (await self._repository.commit(change, ())).adapter
        except AdapterExists:
            return await self._adapter(tenant, command, beginning)

    async def _submit(
        self,
        tenant: str,
        command: AdaptCommand,
        kind: JobKind,
        request: Mapping[str, Any],
        reply: PendingReply[JobRecord] | None,
    ) -> JobRecord:
        if command.callback is not None:
            request = {**request, "callback": command.callback}
        return await asyncio.to_thread(
            lambda: self._jobs.submit(
                tenant,
                command.adapter,
                kind,
                request,
                deadline_seconds=self._deadline_seconds,
                max_open=self._max_open,
                reply=reply,
            )
        )

    async def _check_open(self, tenant: str) -> None:
        """Raises TooManyJobs where the newest jobs show that one more will be refused, before it is sent."""
        newest = await asyncio.to_thread(self._jobs.jobs, tenant, limit=2 * self._max_open)
        if sum(job.finished_at is None for job in newest) >= self._max_open:
            raise TooManyJobs(f"{self._max_open} jobs may be queued or running at once; wait for one to end.")

    def _check_callback(self, url: str | None) -> None:
        if url is not None:
            check_callback(url, self._callback_urls)

    async def job(self, tenant: str, job_id: str) -> JobRecord:
        """One job. Raises UnknownJob.

        Who hears here that it made a version is answered by it from then on, or as soon as it is loaded.
        """
        job = await asyncio.to_thread(self._jobs.job, tenant, job_id)
        if job.version is not None:
            with suppress(UnknownAdapter, RegistryUnavailable):
                adapter = await asyncio.to_thread(self._repository.registry.adapter, tenant, job.adapter)
                await self._repository.aliases.get(tenant, job.adapter, min_epoch=adapter.epoch)
        return job

    async def jobs(
        self, tenant: str, adapter: str | None, after: str | None, limit: int
    ) -> Sequence[JobRecord]:
        """The tenant's jobs, the newest first."""
        return await asyncio.to_thread(self._jobs.jobs, tenant, adapter, after, limit)

    async def cancel(self, tenant: str, job_id: str) -> JobRecord:
        """Cancels a queued job, or has a running one end within seconds. Raises UnknownJob, JobFinished."""
        job = await asyncio.to_thread(self._jobs.request_cancel, tenant, job_id)
        if job.state == "cancelled":
            await self._repository.drop(tenant, job.adapter_uid, upload_of(job.request))
        return job


async def _parts(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The body in parts of a size that memory is not short of."""
    part = bytearray()
    async for chunk in body:
        part += chunk
        while len(part) >= _PART_BYTES:
            yield bytes(part[:_PART_BYTES])
            del part[:_PART_BYTES]
    if part:
        yield bytes(part)
