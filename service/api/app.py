"""The FastAPI application and its main routes: request, one domain call, response.

Errors become responses in service/errors.py.
"""

from __future__ import annotations

import asyncio
import re
from typing import Annotated

from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response

from adapters.examples.validation import check_id
from adapters.jobs.submission import JobSubmitter
from adapters.prediction.export import Format
from adapters.registry.records import UnknownAdapter, UnknownJob
from models.preprocess.limits import InputError
from service import __version__, errors
from service.api.docs import add_docs
from service.api.embeddings import add_openai
from service.api.events import Events, brief
from service.api.idempotency import IdempotencyGuard, Replying
from service.api.openapi import body, describe, once, problems
from service.api.paging import Behind, Limit
from service.api.tenants import add_tenants
from service.components import Components
from service.edge.access import needs
from service.edge.auth import Tenant, count_items, in_vain, tenant_of
from service.edge.gateway import BULK, UPLOAD_PATIENCE
from service.errors import Problem
from service.monitoring.metrics import CONTENT_TYPE
from service.payloads import render, requests
from service.payloads import responses as answer_schemas
from service.payloads.reader import RequestReader, media_type
from service.server.process import told_to_end

_NAME = re.compile(requests.ADAPTER_PATTERN)
_JOB = re.compile(r"[0-9a-f]{32}")

# These dependencies are async because FastAPI runs any other in a thread, which costs 0.2 ms per request.


async def adapter_name(adapter: str) -> str:
    """Return the adapter named in the path. Raises UnknownAdapter for a name that no adapter can have."""
    if _NAME.fullmatch(adapter) is None:
        raise UnknownAdapter(adapter[:63])
    return adapter


async def example_id(example: str) -> str:
    """Return the example id in the path, which may contain slashes."""
    check_id(example)
    return example


async def job_id(job: str) -> str:
    """Return the job id in the path. Raises UnknownJob for an id that no job can have."""
    if _JOB.fullmatch(job) is None:
        raise UnknownJob(job[:63])
    return job


async def jobs_adapter(adapter: str | None = None) -> str | None:
    """Return the adapter whose jobs are listed, None for all. An invalid name becomes "", which none has."""
    return adapter if adapter is None or _NAME.fullmatch(adapter) else ""


async def expected(if_match: Annotated[str | None, Header()] = None) -> str | None:
    """Return the entity tag that must still match, or None if any does: for `*`, or without the header."""
    return None if if_match is None or if_match.strip() == "*" else if_match.strip()


Adapter = Annotated[str, Depends(adapter_name)]
Example = Annotated[str, Depends(example_id)]
Expected = Annotated[str | None, Depends(expected)]
Job = Annotated[str, Depends(job_id)]
JobsAdapter = Annotated[str | None, Depends(jobs_adapter)]
Version = Annotated[int, Path(ge=1, le=requests.BIGGEST)]


def build_api(components: Components) -> FastAPI:
    """Return the application. Its routes hold no state; all state is in the components."""
    # A redirect to the path without its trailing slash would repeat the host that the caller sent.
    api = FastAPI(
        title="Topwork",
        version=__version__,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    settings = components.settings
    bodies = RequestReader(
        settings.max_examples, settings.max_inputs, settings.max_openai_inputs, settings.max_text_chars
    )
    keyed = IdempotencyGuard(components.registry.replies)
    errors.install(api)
    add_flows(api, components, bodies, keyed)
    add_openai(api, components.predictor, bodies)
    add_adapters(api, components, bodies, keyed)
    add_examples(api, components, bodies, keyed)
    # A stream ends by itself before the edge aborts it.
    events = Events(components.submitter, 0.9 * settings.request_timeout)
    components.closing.enter_context(told_to_end(events.close))
    add_jobs(api, components.submitter, events)
    add_tenants(api, components.registry.tenants, components.eraser, bodies)
    describe(api)
    add_docs(api)
    return api


def add_flows(api: FastAPI, components: Components, bodies: RequestReader, keyed: IdempotencyGuard) -> None:
    """Add the routes for adapting, predicting and embedding, for backbones and for metrics."""
    pipeline, predictor, batchers = components.pipeline, components.predictor, components.batchers
    submitter, uploads = components.submitter, components.uploads

    @api.post(
        "/adapt",
        openapi_extra=once(
            body(requests.AdaptRequest, files="examples", bulk=requests.UploadRequest), 200, 202
        ),
        responses={
            200: {"model": answer_schemas.AdaptResponse},
            202: {"model": answer_schemas.SubmittedOut},
            **problems(400, 404, 408, 409, 413, 415, 422, 429),
        },
    )
    @needs("adapt", bulk=True)
    async def adapt(request: Request, tenant: Tenant) -> Response:
        """Learn from examples: a new version comes back, with what it is worth, or a job that makes one."""
        learn = upload if media_type(request) in BULK else teach
        return await keyed.answer(request, tenant, lambda asked, reply: learn(asked, tenant, reply))

    async def upload(request: Request, tenant: str, reply: Replying) -> Response:
        form = BULK[media_type(request)]
        async with uploads.wait(tenant, UPLOAD_PATIENCE):
            command, content = bodies.bulk(request, form)
            job = await submitter.bulk(tenant, form, command, content, reply(render.submitted))
        return render.submitted(job)

    async def teach(request: Request, tenant: str, reply: Replying) -> Response:
        command = await bodies.adapt(request)
        count_items(request, len(command.posted))
        if command.fine_tune is not None:
            return render.tuning(await submitter.fine_tune(tenant, command, reply(render.tuning)))
        return render.adapted(await pipeline.adapt(tenant, command, reply(render.adapted)))

    @api.post(
        "/predict",
        openapi_extra=body(requests.PredictRequest, files="inputs", query=requests.PredictRequest),
        responses={200: {"model": answer_schemas.PredictResponse}, **problems(404, 409, 413, 415, 422, 429)},
    )
    @needs("predict", direct=True)
    async def predict(request: Request) -> Response:
        """Predict with the live version, or with the one named."""
        tenant = await tenant_of(request)
        if (name := bodies.adapter(request)) is not None:
            predictor.check_room(tenant, name)
        asked = await bodies.predict(request)
        count_items(request, len(asked.query.inputs))
        found = await predictor.predict(tenant, asked.query)
        if all(isinstance(item, InputError) for item in found.items):
            in_vain(request)
        return render.predicted(found, raw=asked.raw)

    @api.post(
        "/embed",
        openapi_extra=body(requests.EmbedRequest, files="inputs", query=requests.EmbedRequest),
        responses={200: {"model": answer_schemas.EmbedResponse}, **problems(413, 415, 422, 429)},
    )
    @needs("predict", direct=True)
    async def embed(request: Request) -> Response:
        """The bare embeddings of inputs."""
        tenant = await tenant_of(request)
        name, inputs, raw = await bodies.embed(request)
        count_items(request, len(inputs))
        found = await predictor.embed(tenant, name, inputs)
        if len(found.errors) == len(inputs):
            in_vain(request)
        content = await asyncio.to_thread(render.embedded, batchers[name], name, found, raw=raw)
        return Response(content, media_type="application/json")

    @api.get("/backbones", responses={200: {"model": answer_schemas.BackbonesOut}})
    @needs("key")
    async def backbones() -> Response:
        """What can be adapted."""
        return render.backbones(batchers, components.surveyor.measured)

    # Prometheus scrapes this route, and its configuration should not hold a key.
    @api.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    @needs("nothing")
    async def metrics() -> Response:
        """What Prometheus scrapes."""
        return Response(await asyncio.to_thread(components.metrics.render), media_type=CONTENT_TYPE)


def add_adapters(
    api: FastAPI, components: Components, bodies: RequestReader, keyed: IdempotencyGuard
) -> None:
    """Add the routes for adapters, their versions and their live alias."""
    catalog, editor, exporter = components.catalog, components.editor, components.exporter
    eraser, restorer = components.eraser, components.restorer

    @api.get("/adapters", responses={200: {"model": answer_schemas.AdaptersOut}})
    @needs("key")
    async def adapters(tenant: Tenant, cursor: Behind, limit: Limit = 100) -> Response:
        """The tenant's adapters in the order of their names."""
        return render.adapters(await catalog.adapters(tenant, cursor, limit + 1), limit)

    @api.get("/adapters/{adapter}", responses={200: {"model": answer_schemas.AdapterOut}, **problems(404)})
    @needs("key")
    async def adapter(tenant: Tenant, adapter: Adapter) -> Response:
        """One adapter. Its entity tag stands for what `live` points to."""
        return render.one_adapter(await catalog.adapter(tenant, adapter))

    @api.delete("/adapters/{adapter}", responses={200: {"model": answer_schemas.ErasureOut}, **problems(404)})
    @needs("adapt")
    async def delete_adapter(tenant: Tenant, adapter: Adapter) -> Response:
        """Erase an adapter with its examples, versions and jobs: all of it is gone within 5 seconds."""
        return render.erased(await eraser.adapter(tenant, adapter))

    @api.get(
        "/adapters/{adapter}/versions",
        responses={200: {"model": answer_schemas.VersionsOut}, **problems(404)},
    )
    @needs("key")
    async def versions(tenant: Tenant, adapter: Adapter) -> Response:
        """The versions that are kept, with their reports, the newest first."""
        return render.versions(*await catalog.versions(tenant, adapter))

    @api.get(
        "/adapters/{adapter}/versions/{version}",
        responses={200: {"model": answer_schemas.VersionOut}, **problems(404)},
    )
    @needs("key")
    async def version(tenant: Tenant, adapter: Adapter, version: Version) -> Response:
        """One version with its report."""
        return render.one_version(*await catalog.version(tenant, adapter, version))

    @api.get(
        "/adapters/{adapter}/versions/{version}/export",
        response_class=Response,
        responses={200: {"content": {"application/octet-stream": {}}}, **problems(404, 409)},
    )
    @needs("adapt")
    async def export(tenant: Tenant, adapter: Adapter, version: Version, format: Format = "onnx") -> Response:
        """The version as one ONNX file, from prepared inputs to probabilities, or its head as safetensors."""
        content = await exporter.export(tenant, adapter, version, format)
        return render.file(content, f"{adapter}-{version}.{format}")

    @api.put(
        "/adapters/{adapter}/aliases/live",
        openapi_extra=body(requests.PromoteRequest),
        responses={200: {"model": answer_schemas.AdapterOut}, **problems(404, 412, 415, 422)},
    )
    @needs("adapt")
    async def promote(request: Request, tenant: Tenant, adapter: Adapter, etag: Expected) -> Response:
        """Promote a version, or roll back to it: then newer ones are withheld until a person lifts that."""
        wanted = await bodies.model(request, requests.PromoteRequest)
        return render.one_adapter(await catalog.promote(tenant, adapter, wanted.version, etag))

    @api.post(
        "/adapters/{adapter}/versions/{version}/restore",
        openapi_extra=once({}, 200),
        responses={200: {"model": answer_schemas.RestoreResponse}, **problems(400, 404, 409, 412)},
    )
    @needs("adapt")
    async def restore(
        request: Request, tenant: Tenant, adapter: Adapter, version: Version, etag: Expected
    ) -> Response:
        """Make a version live, and the examples those that it was fitted on; the others are set aside."""

        async def go_back(asked: Request, reply: Replying) -> Response:
            await bodies.nothing(asked)
            done = await restorer.restore(tenant, adapter, version, etag, reply(render.restored))
            return render.restored(done)

        return await keyed.answer(request, tenant, go_back)

    @api.post(
        "/adapters/{adapter}/rebase",
        openapi_extra=body(requests.RebaseRequest),
        responses={200: {"model": answer_schemas.AdaptResponse}, **problems(404, 409, 415, 422, 429)},
    )
    @needs("adapt")
    async def rebase(request: Request, tenant: Tenant, adapter: Adapter) -> Response:
        """Move the adapter to another backbone: its kept inputs are embedded again, and fitted."""
        wanted = await bodies.model(request, requests.RebaseRequest)
        return render.revised(await editor.rebase(tenant, adapter, wanted.backbone, wanted.promote))


def add_examples(
    api: FastAPI, components: Components, bodies: RequestReader, keyed: IdempotencyGuard
) -> None:
    """Add the routes for examples and feedback."""
    catalog, editor = components.catalog, components.editor

    @api.get(
        "/adapters/{adapter}/examples",
        responses={200: {"model": answer_schemas.ExamplesPage}, **problems(404)},
    )
    @needs("adapt")
    async def examples(
        tenant: Tenant, adapter: Adapter, cursor: Behind, limit: Limit = 100, excluded: bool | None = None
    ) -> Response:
        """The examples in the order of their ids; by `excluded` those set aside alone, or the others."""
        found = await catalog.examples(tenant, adapter, cursor, limit + 1, excluded)
        return render.examples(*found, limit)

    @api.delete(
        "/adapters/{adapter}/examples",
        responses={200: {"model": answer_schemas.RemovalResponse}, **problems(404, 409, 422, 429)},
    )
    @needs("adapt")
    async def remove_examples(
        tenant: Tenant,
        adapter: Adapter,
        id: Annotated[list[str] | None, Query(max_length=1_000)] = None,
        all: bool = False,
    ) -> Response:
        """Erase the examples named by `id` (repeat it), or all, and the versions fitted on them; then fit."""
        return render.removed(await editor.remove(tenant, adapter, which(id, all)))

    @api.get(
        "/adapters/{adapter}/examples/{example:path}",
        responses={200: {"model": answer_schemas.ExampleOut}, **problems(404)},
    )
    @needs("adapt")
    async def example(tenant: Tenant, adapter: Adapter, example: Example) -> Response:
        """One example with its input, if inputs are kept."""
        return render.one_example(*await catalog.example(tenant, adapter, example))

    @api.delete(
        "/adapters/{adapter}/examples/{example:path}",
        responses={200: {"model": answer_schemas.RemovalResponse}, **problems(404, 409, 429)},
    )
    @needs("adapt")
    async def remove_example(tenant: Tenant, adapter: Adapter, example: Example) -> Response:
        """Erase one example, and the versions that were fitted on it; then fit what is left."""
        return render.removed(await editor.remove(tenant, adapter, [example]))

    @api.patch(
        "/adapters/{adapter}/examples/{example:path}",
        openapi_extra=once(body(requests.AmendRequest), 200),
        responses={200: {"model": answer_schemas.AdaptResponse}, **problems(400, 404, 409, 415, 422, 429)},
    )
    @needs("adapt")
    async def amend_example(request: Request, tenant: Tenant, adapter: Adapter, example: Example) -> Response:
        """Relabel one example, set it aside or take it back, or group it; then fit."""
        return await keyed.answer(
            request, tenant, lambda asked, reply: amend(asked, tenant, adapter, example, reply)
        )

    async def amend(request: Request, tenant: str, adapter: str, example: str, reply: Replying) -> Response:
        wanted = await bodies.amendment(request)
        done = await editor.amend(tenant, adapter, example, wanted, reply(render.revised))
        return render.revised(done)

    @api.post(
        "/adapters/{adapter}/feedback",
        openapi_extra=once(body(requests.FeedbackRequest), 200),
        responses={200: {"model": answer_schemas.AdaptResponse}, **problems(400, 404, 409, 415, 422, 429)},
    )
    @needs("adapt")
    async def feedback(request: Request, tenant: Tenant, adapter: Adapter) -> Response:
        """Tell what is right for an input, or for a kept example."""
        return await keyed.answer(
            request, tenant, lambda asked, reply: correct(asked, tenant, adapter, reply)
        )

    async def correct(request: Request, tenant: str, adapter: str, reply: Replying) -> Response:
        told = await bodies.feedback(request)
        return render.revised(await editor.feedback(tenant, adapter, told, reply(render.revised)))


def add_jobs(api: FastAPI, submitter: JobSubmitter, events: Events) -> None:
    """Add the routes for jobs, which outlive their request."""

    @api.get("/jobs", responses={200: {"model": answer_schemas.JobsOut}, **problems(422)})
    @needs("adapt")
    async def jobs(tenant: Tenant, cursor: Behind, adapter: JobsAdapter, limit: Limit = 100) -> Response:
        """The tenant's jobs, the newest first; what is wrong with each line of an upload is left out."""
        found = await submitter.jobs(tenant, adapter, cursor, limit + 1)
        return render.jobs([brief(one) for one in found], limit)

    @api.get("/jobs/{job}", responses={200: {"model": answer_schemas.JobOut}, **problems(404)})
    @needs("adapt")
    async def job(tenant: Tenant, job: Job) -> Response:
        """One job."""
        return render.one_job(await submitter.job(tenant, job))

    @api.get(
        "/jobs/{job}/events",
        response_class=Response,
        responses={200: {"content": {"text/event-stream": {}}}, **problems(404, 429)},
    )
    @needs("adapt")
    async def stream(tenant: Tenant, job: Job) -> Response:
        """The job with each change, as server-sent events, until it has ended."""
        return await events.stream(tenant, job)

    @api.post("/jobs/{job}/cancel", responses={200: {"model": answer_schemas.JobOut}, **problems(404, 409)})
    @needs("adapt")
    async def cancel(tenant: Tenant, job: Job) -> Response:
        """Cancel a job; one that runs ends within seconds, and publishes nothing."""
        return render.one_job(await submitter.cancel(tenant, job))


def which(ids: list[str] | None, everything: bool) -> list[str] | None:
    """Return the ids to remove, None for all. Raises a 422 Problem unless exactly one of the two is given."""
    if bool(ids) == everything:
        raise Problem(422, "invalid_request", "Name the examples as `id`, or say `all=true`.")
    return ids
