"""One attempt at a bulk job: reads the upload, stores its examples in batches, and fits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import BinaryIO, Protocol, TypeVar, cast

from adapters.adaptation.adapt import AdaptPipeline
from adapters.adaptation.commands import (
    AdaptCommand,
    AdapterFull,
    ExampleEdit,
    ExamplesRejected,
    RevisionResult,
)
from adapters.adaptation.input_embedder import BatchEmbedder
from adapters.adaptation.options import FitOptions, terms_of, with_options
from adapters.adaptation.promotion.decision import as_asked
from adapters.adaptation.repository import AdapterSnapshot
from adapters.adaptation.revision.files import AdapterContext
from adapters.examples.upload import BadUpload, Found, Record, UploadLimits, cut
from adapters.examples.upload_forms import Form, records
from adapters.examples.validation import PostedExample, RejectedExample, ValidExample, admit
from adapters.jobs.lease import Lease
from adapters.jobs.upload_conflicts import UploadConflicts, id_of
from adapters.probe.fit import OneLabel
from adapters.processes.heartbeat import ElapsedTime
from adapters.registry.errors import RevisionMoved, UnknownAdapter
from adapters.registry.records import AdapterRecord
from adapters.threads import DATABASE
from models.batching.batcher import Batcher
from models.batching.stall_detector import StallDetector
from models.preprocess.limits import InputError

logger = logging.getLogger("topwork")

T = TypeVar("T")

# Limits of a batch that is embedded and stored together: number of examples, and bytes of their inputs.
BATCH_EXAMPLES = 1_000
_BATCH_BYTES = 16 << 20
_MOST_ERRORS = 1_000  # rejected examples that the progress lists
_CHECK_SECONDS = 0.5  # between checks of the lease and of the backbone
_PAUSE_SECONDS = 0.2  # before a retry, after another request has revised the adapter
# Share of the progress that reading, embedding and storing make up. The fit is the rest.
_STORING = 0.95


class AheadEmbedder(BatchEmbedder, Protocol):
    """Embeds inputs before they are asked for."""

    async def begin(self, digests: Collection[str]) -> None:
        """Begin to embed the upload's inputs with these digests, or leave that to `embed`."""
        ...

    def close(self) -> None:
        """Stop what was begun."""
        ...


class BulkAttempt:
    """One attempt at one job. For one event loop. `ahead`: embeds for the pipeline, if something does."""

    def __init__(
        self,
        lease: Lease,
        adapter: AdapterRecord,
        pipeline: AdaptPipeline,
        batcher: Batcher,
        limits: UploadLimits,
        ahead: AheadEmbedder | None = None,
    ) -> None:
        self._lease = lease
        self._job = lease.claim.job
        self._request = self._job.request
        self._adapter = adapter
        self._pipeline = pipeline
        self._batcher = batcher
        self._standstill = StallDetector(batcher)
        self._limits = limits
        self._ahead = ahead
        self._digests: set[str] = set()  # of all inputs, if something embeds ahead
        self._replaces = self._request["update"] == "replace"
        self._ids: set[str] = set()
        self._found = Found()
        self._rejected = 0
        self._truncated = 0
        self._errors: list[dict[str, str]] = []

    async def store(self, file: BinaryIO) -> None:
        """Read the whole upload once, then embed and store its examples in batches."""
        size = file.tell()
        conflicts = await self._read(file)
        if self._ahead is not None:
            await self._until_stopped(self._ahead.begin(await self._new()))
        read = self._records(file, Found())
        while part := _some(read):
            without = [conflicts.mark(record) for record in part]
            try:
                await self._persist(lambda some=without: self._store(some))  # type: ignore[misc]
            finally:
                self._report("store", _STORING * min(1.0, file.tell() / max(size, 1)))
        self._report("fit" if self._request["fit"] else "store", _STORING)

    async def finish(self) -> None:
        """Remove the replaced examples, fit, and end the job."""
        await DATABASE.run(self._lease.tell)
        if not self._ids:
            raise BadUpload("no_examples", "None of the examples can be used; `progress.errors` says why.")
        fit = self._request["fit"]

        async def step(state: AdapterSnapshot | None) -> RevisionResult | None:
            if state is None:
                raise UnknownAdapter(self._job.adapter)
            stale = self._replaces and any(example.id not in self._ids for example in state.examples)
            before = terms_of(state.adapter)
            asked = self._request
            terms = with_options(before, FitOptions.of_job(asked))
            if not fit and not stale and terms == before:
                return None
            promote = as_asked(asked["promote"], self._job.created_at, state.adapter)
            edit = ExampleEdit(fit=fit, promote=promote)
            if stale:
                edit = replace(edit, clear=True, uploaded=self._ids)
            subject = AdapterContext.of(self._job.tenant, self._job.adapter, terms, state)
            return await self._pipeline.writer.revise(subject, edit, {})

        writer = self._pipeline.writer
        try:
            await self._persist(lambda: writer.in_turn(self._job.tenant, self._job.adapter, step))
        except OneLabel as error:
            if not self._rejected:
                raise
            text = f"{error} {self._rejected:,} were rejected; `progress.errors` says why."
            raise OneLabel(text) from error
        if not fit:
            await DATABASE.run(writer.repository.registry.jobs.succeed, self._lease.claim)

    async def _read(self, file: BinaryIO) -> UploadConflicts:
        """Read the whole upload; return its conflicts.

        Every attempt reads all of it, since the stored examples do not show conflicts. If it cannot be read
        to its end, the rejected examples up to there are reported first.
        """
        conflicts = UploadConflicts()
        try:
            for record in self._records(file, self._found):
                usable, rejected = self._checked(record.posted)
                self._reject([(record.place, one) for one in rejected])
                for example in usable:
                    conflicts.add(example)
                    if self._ahead is not None:
                        self._digests.add(example.digest)
        except BadUpload:
            self._report("store", 0.0)
            raise
        # Rejected examples are counted again when the upload is stored.
        self._rejected, self._errors = 0, []
        return conflicts

    async def _new(self) -> set[str]:
        """Return the digests of the inputs that no adapter of the tenant has yet."""
        registry, adapter = self._pipeline.writer.repository.registry, self._adapter
        found = await DATABASE.run(registry.places_of, adapter.tenant, adapter.fingerprint, self._digests)
        return self._digests - found.keys()

    def _records(self, file: BinaryIO, found: Found) -> Iterator[Record]:
        """Yield the upload's records, checking the lease before each one."""
        file.seek(0)
        form, columns = cast(Form, self._request["form"]), self._request.get("columns") or {}
        for record in records(form, file, self._limits, columns, found):
            self._lease.check()
            yield record

    def _checked(self, posted: PostedExample) -> tuple[Sequence[ValidExample], Sequence[RejectedExample]]:
        """Return the example, or why it is rejected. Its input may still fail when it is embedded."""
        adapter = self._adapter
        return admit([posted], task=adapter.task, kind=adapter.kind, known_labels=())

    async def _store(self, part: Sequence[Record]) -> None:
        command = AdaptCommand(
            self._job.adapter,
            [record.posted for record in part],
            fit=False,
            uploaded=self._ids if self._replaces else None,
        )
        rejected: Sequence[RejectedExample]
        try:
            outcome = await self._pipeline.adapt(self._job.tenant, command)
            rejected = outcome.rejected
            self._truncated += outcome.revised.truncated
        except ExamplesRejected as error:
            rejected = error.rejected
        except AdapterFull as error:
            self._reject_at(part, getattr(error, "rejected", ()))
            raise
        bad = {one.index for one in rejected}
        self._ids |= {id_of(record.posted) for index, record in enumerate(part) if index not in bad}
        self._reject_at(part, rejected)

    def _reject_at(self, part: Sequence[Record], rejected: Sequence[RejectedExample]) -> None:
        self._reject([(part[one.index].place, one) for one in rejected])

    def _reject(self, rejected: Sequence[tuple[str, RejectedExample]]) -> None:
        """Count rejected examples, given with their places, and keep the errors of the first _MOST_ERRORS."""
        self._rejected += len(rejected)
        room = _MOST_ERRORS - len(self._errors)
        self._errors += [
            {"place": cut(place), "code": one.code, "detail": cut(one.detail)}
            for place, one in rejected[:room]
        ]

    def _report(self, phase: str, share: float) -> None:
        self._lease.report(
            share,
            {
                "phase": phase,
                "stored": len(self._ids),
                "rejected": self._rejected,
                "skipped": self._found.skipped,
                "format": self._found.format(),
                "truncated": self._truncated,
                "errors": list(self._errors),
            },
        )

    async def _persist(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Return the result of `attempt`, repeated whenever another request has revised the adapter."""
        while True:
            self._lease.check()
            with suppress(RevisionMoved):
                return await self._until_stopped(attempt())
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _until_stopped(self, work: Awaitable[T]) -> T:
        """Return the work's result. If the lease says to stop, the work is cancelled and records nothing."""
        running = asyncio.ensure_future(work)
        # Time in which this process was stopped or had no core does not count as a stall.
        elapsed = ElapsedTime(2 * _CHECK_SECONDS)
        try:
            while not (await asyncio.wait([running], timeout=_CHECK_SECONDS))[0]:
                self._lease.check()
                self._look(elapsed.lap())
            return running.result()
        finally:
            running.cancel()

    def _look(self, passed: float) -> None:
        """Abandon a backbone that hangs: waiting calls raise BatcherClosed, and another attempt continues."""
        if self._batcher.alive and (why := self._standstill.look(passed)) is not None:
            logger.error("the backbone of the job %s is abandoned: %s", self._job.id, why)
            self._batcher.abandon()


def _some(found: Iterator[Record]) -> list[Record]:
    """Return the next batch of records, empty at the end."""
    part: list[Record] = []
    size = 0
    for record in found:
        part.append(record)
        size += 0 if isinstance(record.posted.input, InputError) else len(record.posted.input)
        if len(part) == BATCH_EXAMPLES or size >= _BATCH_BYTES:
            break
    return part
