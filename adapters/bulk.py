"""The work of a bulk job: an upload's examples are stored in parts, then a head is fitted on them."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO, Literal, TypeVar, cast

from adapters.adapting import AdaptCommand, Adapting, ExamplesRejected, terms_of
from adapters.admission import Admitted, Rejected
from adapters.aliases import Aliases
from adapters.cache import Cache
from adapters.example import input_digest
from adapters.fitter import Fitter
from adapters.gathering import Subject, kept_inputs
from adapters.head import Head
from adapters.jobs import upload_of
from adapters.keeping import Keeping, State
from adapters.lease import Lease
from adapters.records import UnknownAdapter
from adapters.registry import Registry
from adapters.revising import AdapterLimits, Edit, Revised, Revising
from adapters.store import Store
from adapters.uploads import BadUpload, Form, Record, UploadLimits, records
from models.backbone import Backbone
from models.batcher import Batcher
from models.exported import find
from models.preprocess import InputError
from models.spec import UnknownBackbone

T = TypeVar("T")

# Examples, and bytes of their inputs, that are embedded and stored together.
_EXAMPLES = 1_000
_BYTES = 16 << 20
_MOST_ERRORS = 1_000
_CHECK_SECONDS = 0.5
# Of the whole work: reading, embedding and storing. The rest is the fit.
_STORING = 0.95


class Bulk:
    """Does bulk jobs. Blocking, one at a time. threads: of the backbone."""

    def __init__(
        self,
        registry: Registry,
        store: Store,
        *,
        device: Literal["cpu", "cuda"],
        threads: int,
        uploads: UploadLimits,
        limits: AdapterLimits,
    ) -> None:
        self._registry = registry
        self._store = store
        self._device = device
        self._threads = threads
        self._uploads = uploads
        # A job has its own deadline.
        self._limits = replace(limits, probe=replace(limits.probe, limit_seconds=float("inf")))

    def run(self, lease: Lease) -> None:
        """Does the job, and records its success.

        The job's request: {"form", "upload", "update", "promote", "fit"}. What was stored stays when it ends
        early, and is not embedded again by another attempt. Raises BadUpload, OneLabel, NothingToFit,
        AdapterFull, InputError, StoreError, RegistryError, and what Lease.check raises.
        """
        asyncio.run(self._run(lease))

    async def _run(self, lease: Lease) -> None:
        job = lease.claim.job
        adapter = self._registry.adapter(job.tenant, job.adapter)
        export = find(adapter.backbone)
        if export is None:
            raise UnknownBackbone(f"The backbone {adapter.backbone} is not exported where this worker runs.")
        backbone = Backbone.open(
            export, device=self._device, threads=self._threads, limits=self._uploads.inputs
        )
        batcher = Batcher(backbone, max_queue=_EXAMPLES, workers=self._threads)
        fitter = Fitter()
        keeping = Keeping(self._registry, self._store, Aliases(self._registry), job=lease.claim)
        try:
            await asyncio.gather(batcher.start(), fitter.start())
            revising = Revising(keeping, fitter, Cache[Head](0, lambda head: head.nbytes), self._limits)
            work = _Work(lease, Adapting(revising, {adapter.backbone: batcher}), self._uploads)
            with tempfile.TemporaryFile(prefix="topwork-upload-") as file:
                for part in upload_of(job.request):
                    file.write(self._store.read(job.tenant, adapter.uid, part))
                await work.store(cast(BinaryIO, file))
            await work.finish()
        finally:
            keeping.close()
            await batcher.close()
            await fitter.close()
            backbone.close()


class _Work:
    """One attempt at one job."""

    def __init__(self, lease: Lease, adapting: Adapting, limits: UploadLimits) -> None:
        self._lease = lease
        self._job = lease.claim.job
        self._request = self._job.request
        self._adapting = adapting
        self._limits = limits
        self._ids: set[str] = set()
        self._rejected = 0
        self._errors: list[dict[str, str]] = []

    async def store(self, file: BinaryIO) -> None:
        """Embeds and stores the upload's examples, part by part."""
        size = file.tell()
        file.seek(0)
        found = records(cast(Form, self._request["form"]), file, self._limits)
        while part := _some(found):
            await self._until_stopped(self._store(part))
            self._report("store", _STORING * min(1.0, file.tell() / max(size, 1)))
        self._report("fit" if self._request["fit"] else "store", _STORING)

    async def finish(self) -> None:
        """Forgets what is replaced, fits, and ends the job."""
        await asyncio.to_thread(self._lease.tell)
        if not self._ids:
            raise BadUpload("no_examples", "None of the examples can be used; `errors` says why.")
        clear = self._request["update"] == "replace"
        fit = self._request["fit"]

        async def step(state: State | None) -> Revised | None:
            if state is None:
                raise UnknownAdapter(self._job.adapter)
            stale = any(example.id not in self._ids for example in state.examples)
            if not fit and not (clear and stale):
                return None
            edit = Edit(fit=fit, promote=self._request["promote"])
            if clear and stale:
                edit = replace(edit, upserts=await self._kept(state), clear=True)
            subject = Subject.of(self._job.tenant, self._job.adapter, terms_of(state.adapter), state)
            return await self._adapting.revising.revise(subject, edit, {})

        revising = self._adapting.revising
        await self._until_stopped(revising.in_turn(self._job.tenant, self._job.adapter, step))
        if not fit:
            await asyncio.to_thread(revising.keeping.registry.jobs.succeed, self._lease.claim)

    async def _store(self, part: Sequence[Record]) -> None:
        command = AdaptCommand(self._job.adapter, [record.posted for record in part], fit=False)
        rejected: Sequence[Rejected]
        try:
            rejected = (await self._adapting.adapt(self._job.tenant, command)).rejected
        except ExamplesRejected as error:
            rejected = error.rejected
        bad = {one.index for one in rejected}
        self._ids |= {_id_of(record) for index, record in enumerate(part) if index not in bad}
        self._rejected += len(bad)
        room = _MOST_ERRORS - len(self._errors)
        self._errors += [
            {"place": part[one.index].place, "code": one.code, "detail": one.detail}
            for one in rejected[:room]
        ]

    async def _kept(self, state: State) -> list[Admitted]:
        """The upload's examples as they are, with their inputs if these are kept: to be stored together."""
        examples = [example for example in state.examples if example.id in self._ids]
        inputs: Sequence[bytes | str | None] = [None] * len(examples)
        if state.adapter.keep_inputs:
            inputs = await kept_inputs(self._adapting.revising.keeping, state.adapter, examples)
        return [
            Admitted(one.id, one.digest, one.target, value)
            for one, value in zip(examples, inputs, strict=True)
        ]

    def _report(self, phase: str, share: float) -> None:
        self._lease.report(
            share,
            {
                "phase": phase,
                "stored": len(self._ids),
                "rejected": self._rejected,
                "errors": list(self._errors),
            },
        )

    async def _until_stopped(self, work: Awaitable[T]) -> T:
        """The work's result, unless there is a reason to stop; then nothing more of it is recorded."""
        running = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait([running], timeout=_CHECK_SECONDS))[0]:
                self._lease.check()
            return running.result()
        finally:
            running.cancel()


def _some(found: Iterator[Record]) -> list[Record]:
    """The next records: as many as are embedded and stored together, none at the end."""
    part: list[Record] = []
    size = 0
    for record in found:
        part.append(record)
        size += 0 if isinstance(record.posted.input, InputError) else len(record.posted.input)
        if len(part) == _EXAMPLES or size >= _BYTES:
            break
    return part


def _id_of(record: Record) -> str:
    """The id that an admitted record's example has; see admit."""
    posted = record.posted
    assert not isinstance(posted.input, InputError)
    return input_digest(posted.input) if posted.id is None else posted.id
