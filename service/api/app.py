"""The FastAPI application: an explicit list of its routes, and the endpoints behind them.

Errors become responses in service/errors.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fastapi import FastAPI, Response

from service import __version__, errors
from service.api.adapt import AdaptEndpoints
from service.api.adapters import AdapterEndpoints
from service.api.examples import ExampleEndpoints
from service.api.idempotency import IdempotencyGuard
from service.api.jobs import Events, JobEndpoints
from service.api.openapi import body, describe, once, returns, returns_openai
from service.api.operations import OperationEndpoints, PageEndpoints
from service.api.predict import OpenAIEndpoints, PredictEndpoints
from service.api.tenants import TenantEndpoints
from service.components import Components
from service.edge.routes import NO_BODY, DeclaredRoute
from service.payloads import requests as asked
from service.payloads import tenants as of_tenants
from service.payloads.reader import RequestReader
from service.payloads.responses.adaptation import AdaptResponse, ErasureOut, RemovalResponse, RestoreResponse
from service.payloads.responses.adapters import AdapterOut, AdaptersOut, VersionOut, VersionsOut
from service.payloads.responses.backbones import BackbonesOut
from service.payloads.responses.examples import ExampleOut, ExamplesPage
from service.payloads.responses.jobs import JobOut, JobsOut, SubmittedOut
from service.payloads.responses.openai import OpenAIModel, OpenAIModels, OpenAIResponse
from service.payloads.responses.predictions import EmbedResponse, PredictResponse
from service.payloads.responses.tenants import KeyOut, KeysOut, NewKeyOut, TenantOut, TenantsOut
from service.server.process import told_to_end

get, post, put, patch, delete = (
    partial(DeclaredRoute, method) for method in ("GET", "POST", "PUT", "PATCH", "DELETE")
)


def build_api(components: Components) -> FastAPI:
    """Return the application. Its endpoints hold no state; all state is in the components."""
    settings = components.settings
    reader = RequestReader(settings.max_examples, settings.max_inputs, settings.max_openai_inputs)
    guard = IdempotencyGuard(components.registry.replies)
    # A stream ends by itself before the edge aborts it.
    events = Events(components.submitter, 0.9 * settings.request_timeout)
    components.closing.enter_context(told_to_end(events.close))
    catalog, editor, eraser = components.catalog, components.editor, components.eraser
    return application(
        [
            *prediction_routes(
                AdaptEndpoints(components.pipeline, components.submitter, components.uploads, reader, guard),
                PredictEndpoints(components.predictor, reader),
                OpenAIEndpoints(components.predictor, reader),
                OperationEndpoints(components.batchers, components.surveyor.measured, components.metrics),
            ),
            *adapter_routes(
                AdapterEndpoints(
                    catalog,
                    components.rebaser,
                    components.restorer,
                    components.exporter,
                    eraser,
                    reader,
                    guard,
                ),
                ExampleEndpoints(catalog, editor, reader, guard),
                JobEndpoints(components.submitter, events),
            ),
            *tenant_routes(TenantEndpoints(components.registry.tenants, eraser, reader)),
            *page_routes(PageEndpoints()),
        ]
    )


def application(routes: Sequence[DeclaredRoute]) -> FastAPI:
    """Return an application with these routes, with this service's error format and OpenAPI document."""
    # A redirect to the path without its trailing slash would repeat the host that the caller sent.
    api = FastAPI(
        title="Topwork",
        version=__version__,
        routes=list(routes),
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    errors.install(api)
    describe(api)
    return api


def prediction_routes(
    adapt: AdaptEndpoints, predict: PredictEndpoints, openai: OpenAIEndpoints, operations: OperationEndpoints
) -> list[DeclaredRoute]:
    """Return the routes that learn, predict and embed, and those that operators look at."""
    examples = body(asked.AdaptRequest, "upload", files="examples", bulk=asked.UploadRequest)
    inputs = body(asked.PredictRequest, "inputs", files="inputs", query=asked.PredictRequest)
    to_embed = body(asked.EmbedRequest, "inputs", files="inputs", query=asked.EmbedRequest)
    learned = {
        202: {"model": SubmittedOut},
        **returns(AdaptResponse, 400, 404, 408, 409, 413, 415, 422, 429),
    }
    return [
        post("/adapt", adapt.adapt, "adapt", learned, body=once(examples, 200, 202)),
        post(
            "/predict",
            predict.predict,
            "predict",
            returns(PredictResponse, 404, 409, 413, 415, 422, 429),
            body=inputs,
        ),
        post(
            "/embed",
            predict.embed,
            "predict",
            returns(EmbedResponse, 413, 415, 422, 429),
            body=to_embed,
        ),
        get("/backbones", operations.backbones, "key", returns(BackbonesOut)),
        # Prometheus scrapes this route, and its configuration should not hold a key.
        get("/metrics", operations.metrics, "nothing", returns("text/plain"), response_class=Response),
        post(
            "/v1/embeddings",
            openai.embeddings,
            "predict",
            returns_openai(OpenAIResponse, 404, 413, 415, 422, 429),
            body=body(asked.OpenAIRequest, "inputs"),
        ),
        get("/v1/models", openai.models, "key", returns_openai(OpenAIModels)),
        get("/v1/models/{model:path}", openai.model, "key", returns_openai(OpenAIModel, 404)),
    ]


def adapter_routes(
    adapters: AdapterEndpoints, examples: ExampleEndpoints, jobs: JobEndpoints
) -> list[DeclaredRoute]:
    """Return the routes of adapters, of their versions and examples, and of jobs."""
    one, version = "/adapters/{adapter}", "/adapters/{adapter}/versions/{version}"
    example = "/adapters/{adapter}/examples/{example:path}"
    return [
        get("/adapters", adapters.adapters, "key", returns(AdaptersOut)),
        get(one, adapters.adapter, "key", returns(AdapterOut, 404)),
        delete(one, adapters.delete_adapter, "adapt", returns(ErasureOut, 404)),
        get(f"{one}/versions", adapters.versions, "key", returns(VersionsOut, 404)),
        get(version, adapters.version, "key", returns(VersionOut, 404)),
        get(
            f"{version}/export",
            adapters.export,
            "adapt",
            returns("application/octet-stream", 404, 409),
            response_class=Response,
        ),
        put(
            f"{one}/aliases/live",
            adapters.promote,
            "adapt",
            returns(AdapterOut, 404, 412, 415, 422),
            body=body(asked.PromoteRequest),
        ),
        post(
            f"{version}/restore",
            adapters.restore,
            "adapt",
            returns(RestoreResponse, 400, 404, 409, 412),
            body=once(NO_BODY, 200),
        ),
        post(
            f"{one}/rebase",
            adapters.rebase,
            "adapt",
            returns(AdaptResponse, 404, 409, 415, 422, 429),
            body=body(asked.RebaseRequest),
        ),
        get(f"{one}/examples", examples.examples, "adapt", returns(ExamplesPage, 404)),
        delete(
            f"{one}/examples",
            examples.remove_examples,
            "adapt",
            returns(RemovalResponse, 404, 409, 422, 429),
        ),
        get(example, examples.example, "adapt", returns(ExampleOut, 404)),
        delete(example, examples.remove_example, "adapt", returns(RemovalResponse, 404, 409, 429)),
        patch(
            example,
            examples.amend_example,
            "adapt",
            returns(AdaptResponse, 400, 404, 409, 415, 422, 429),
            body=once(body(asked.AmendRequest), 200),
        ),
        post(
            f"{one}/feedback",
            examples.feedback,
            "adapt",
            returns(AdaptResponse, 400, 404, 409, 415, 422, 429),
            body=once(body(asked.FeedbackRequest, "inputs"), 200),
        ),
        get("/jobs", jobs.jobs, "adapt", returns(JobsOut, 422)),
        get("/jobs/{job}", jobs.job, "adapt", returns(JobOut, 404)),
        get(
            "/jobs/{job}/events",
            jobs.events,
            "adapt",
            returns("text/event-stream", 404, 429),
            response_class=Response,
        ),
        post("/jobs/{job}/cancel", jobs.cancel, "adapt", returns(JobOut, 404, 409)),
    ]


def tenant_routes(tenants: TenantEndpoints) -> list[DeclaredRoute]:
    """Return the routes of tenants, their quotas and their keys."""
    one, keys = "/tenants/{tenant}", "/tenants/{tenant}/keys"
    made = returns(NewKeyOut, 404, 409, 415, 422, status=201)
    return [
        post(
            "/tenants",
            tenants.create_tenant,
            "operator",
            returns(TenantOut, 403, 409, 415, 422, status=201),
            body=body(of_tenants.TenantRequest),
            status_code=201,
        ),
        get("/tenants", tenants.list_tenants, "operator", returns(TenantsOut, 403)),
        get(one, tenants.tenant, "admin", returns(TenantOut, 404)),
        delete(one, tenants.erase_tenant, "operator", returns(ErasureOut, 403, 404)),
        put(
            f"{one}/quotas",
            tenants.set_quotas,
            "operator",
            returns(TenantOut, 403, 404, 415, 422),
            body=body(of_tenants.QuotasIn),
        ),
        get(keys, tenants.keys, "admin", returns(KeysOut, 404)),
        post(keys, tenants.create_key, "admin", made, body=body(of_tenants.KeyRequest), status_code=201),
        post(
            f"{keys}/{{key}}/rotate",
            tenants.rotate_key,
            "admin",
            made,
            body=body(of_tenants.RotateRequest),
            status_code=201,
        ),
        delete(f"{keys}/{{key}}", tenants.revoke_key, "admin", returns(KeyOut, 404)),
    ]


def page_routes(page: PageEndpoints) -> list[DeclaredRoute]:
    """Return the routes of the documentation. Browsers fetch it, so it needs no key."""
    return [
        get("/", page.index, "nothing", include_in_schema=False),
        get("/docs", page.page, "nothing", include_in_schema=False),
        get("/openapi.json", page.document, "nothing", include_in_schema=False),
        get("/docs/errors", page.errors, "nothing", include_in_schema=False),
        get("/docs/{asset}", page.asset, "nothing", include_in_schema=False),
    ]
