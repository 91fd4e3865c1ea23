"""The FastAPI application and its main routes: request, one domain call, response.

Errors become responses in service/errors.py.
"""

from __future__ import annotations

import asyncio

from fastapi import FastAPI, Request, Response

from models.preprocess.limits import InputError
from service import __version__, errors
from service.api.adapters import add_adapters
from service.api.docs import add_docs
from service.api.embeddings import add_openai
from service.api.events import Events
from service.api.examples import add_examples
from service.api.idempotency import IdempotencyGuard, Replying
from service.api.jobs import add_jobs
from service.api.openapi import body, describe, once, problems
from service.api.tenants import add_tenants
from service.components import Components
from service.edge.access import needs
from service.edge.auth import Tenant, count_items, in_vain, tenant_of
from service.edge.gateway import BULK, UPLOAD_PATIENCE
from service.monitoring.metrics import CONTENT_TYPE
from service.payloads import render, requests
from service.payloads import responses as answer_schemas
from service.payloads.backbones import all_backbones
from service.payloads.reader import RequestReader, media_type
from service.server.process import told_to_end

# These dependencies are async because FastAPI runs any other in a thread, which costs 0.2 ms per request.


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
    bodies = RequestReader(settings.max_examples, settings.max_inputs, settings.max_openai_inputs)
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
        return all_backbones(batchers, components.surveyor.measured)

    # Prometheus scrapes this route, and its configuration should not hold a key.
    @api.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    @needs("nothing")
    async def metrics() -> Response:
        """What Prometheus scrapes."""
        return Response(await asyncio.to_thread(components.metrics.render), media_type=CONTENT_TYPE)
