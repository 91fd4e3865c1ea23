"""The endpoint that learns from examples."""

from __future__ import annotations

from fastapi import Request, Response

from adapters.adaptation.adapt import AdaptPipeline
from adapters.examples.upload_forms import MEDIA_TYPES
from adapters.jobs.submission import JobSubmitter
from service.api.dependencies import Tenant
from service.api.idempotency import IdempotencyGuard, Replying
from service.edge.channel import channel_of
from service.edge.concurrency import ConcurrencyLimit
from service.payloads.reader import RequestReader, media_type
from service.payloads.responses.adaptation import render_adapted
from service.payloads.responses.jobs import render_fine_tune, render_submitted

_UPLOAD_WAIT = 3.0  # seconds that an upload waits for a slot


class AdaptEndpoints:
    """Examples in; a new version out, or a job that makes one."""

    def __init__(
        self,
        pipeline: AdaptPipeline,
        submitter: JobSubmitter,
        uploads: ConcurrencyLimit,
        reader: RequestReader,
        guard: IdempotencyGuard,
    ) -> None:
        self._pipeline = pipeline
        self._submitter = submitter
        self._uploads = uploads
        self._reader = reader
        self._guard = guard

    async def adapt(self, request: Request, tenant: Tenant) -> Response:
        """Learn from examples. The answer is a new version with its report, or a job that makes one."""
        learn = self._upload if media_type(request) in MEDIA_TYPES else self._learn
        return await self._guard.answer(request, tenant, lambda asked, reply: learn(asked, tenant, reply))

    async def _upload(self, request: Request, tenant: str, reply: Replying) -> Response:
        form = MEDIA_TYPES[media_type(request)]
        async with self._uploads.wait(tenant, _UPLOAD_WAIT):
            command, content = self._reader.bulk(request, form)
            channel_of(request.scope).adapter = command.adapter
            job = await self._submitter.bulk(tenant, form, command, content, reply(render_submitted))
        return render_submitted(job)

    async def _learn(self, request: Request, tenant: str, reply: Replying) -> Response:
        command = await self._reader.adapt(request)
        channel = channel_of(request.scope)
        channel.adapter = command.adapter
        channel.count_items(len(command.posted) + len(command.meanings or ()))
        if command.fine_tune is not None:
            return render_fine_tune(await self._submitter.fine_tune(tenant, command, reply(render_fine_tune)))
        return render_adapted(await self._pipeline.adapt(tenant, command, reply(render_adapted)))
