"""The routes of the API: an explicit list of who may call them, what they take and what they answer."""

from __future__ import annotations

from functools import partial

from fastapi import Response

from service.api.adapt import AdaptEndpoints
from service.api.adapters import AdapterEndpoints
from service.api.examples import ExampleEndpoints
from service.api.jobs import JobEndpoints
from service.api.openapi import body, calls_back, once, returns, returns_openai, submits
from service.api.operations import OperationEndpoints, PageEndpoints
from service.api.predict import OpenAIEndpoints, PredictEndpoints
from service.api.tenants import TenantEndpoints
from service.edge.routes import NO_BODY, DeclaredRoute
from service.payloads import requests
from service.payloads import tenants as tenant_requests
from service.payloads.responses.adaptation import AdaptResponse, ErasureOut, RemovalResponse, RestoreResponse
from service.payloads.responses.adapters import AdapterDetailOut, AdaptersOut, VersionOut, VersionsOut
from service.payloads.responses.backbones import BackbonesOut
from service.payloads.responses.examples import ExampleOut, ExamplesPage
from service.payloads.responses.jobs import JobOut, JobsOut, SubmittedOut
from service.payloads.responses.openai import OpenAIModel, OpenAIModels, OpenAIResponse
from service.payloads.responses.predictions import EmbedResponse, PredictResponse
from service.payloads.responses.tenants import KeyOut, KeysOut, NewKeyOut, TenantOut, TenantsOut

get, post, put, patch, delete = (
    partial(DeclaredRoute, method) for method in ("GET", "POST", "PUT", "PATCH", "DELETE")
)


def learning_routes(adapt: AdaptEndpoints, predict: PredictEndpoints) -> list[DeclaredRoute]:
    """Return the routes that learn, predict and embed."""
    examples = body(
        requests.AdaptRequest,
        "upload",
        files="examples",
        form=requests.AdaptForm,
        bulk=requests.UploadRequest,
    )
    inputs = body(requests.PredictRequest, "inputs", files="inputs", query=requests.PredictRequest)
    to_embed = body(requests.EmbedRequest, "inputs", files="inputs", query=requests.EmbedRequest)
    learned = submits(SubmittedOut) | returns(AdaptResponse, 400, 404, 408, 409, 413, 415, 422, 429)
    return [
        post("/adapt", adapt.adapt, "adapt", learned, body=once(calls_back(examples), 200, 202)),
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
    ]


def openai_routes(openai: OpenAIEndpoints) -> list[DeclaredRoute]:
    """Return the routes for clients of OpenAI's API."""
    return [
        post(
            "/v1/embeddings",
            openai.create_embeddings,
            "predict",
            returns_openai(OpenAIResponse, 404, 413, 415, 422, 429),
            body=body(requests.OpenAIRequest, "inputs"),
        ),
        get("/v1/models", openai.list_models, "key", returns_openai(OpenAIModels)),
        get("/v1/models/{model:path}", openai.get_model, "key", returns_openai(OpenAIModel, 404)),
    ]


def adapter_routes(adapters: AdapterEndpoints) -> list[DeclaredRoute]:
    """Return the routes of adapters and their versions."""
    one, version = "/adapters/{adapter}", "/adapters/{adapter}/versions/{version}"
    return [
        get("/adapters", adapters.list_adapters, "key", returns(AdaptersOut)),
        get(one, adapters.get_adapter, "key", returns(AdapterDetailOut, 404)),
        delete(one, adapters.delete_adapter, "adapt", returns(ErasureOut, 404)),
        get(f"{one}/versions", adapters.list_versions, "key", returns(VersionsOut, 404)),
        get(version, adapters.get_version, "key", returns(VersionOut, 404)),
        get(
            f"{version}/export",
            adapters.export_version,
            "adapt",
            returns("application/octet-stream", 404, 409),
            response_class=Response,
        ),
        put(
            f"{one}/aliases/live",
            adapters.promote_version,
            "adapt",
            returns(AdapterDetailOut, 404, 412, 415, 422),
            body=body(requests.PromoteRequest),
        ),
        post(
            f"{version}/restore",
            adapters.restore_version,
            "adapt",
            returns(RestoreResponse, 400, 404, 409, 412),
            body=once(NO_BODY, 200),
        ),
        post(
            f"{one}/rebase",
            adapters.rebase_adapter,
            "adapt",
            returns(AdaptResponse, 404, 409, 415, 422, 429),
            body=body(requests.RebaseRequest),
        ),
    ]


def example_routes(examples: ExampleEndpoints) -> list[DeclaredRoute]:
    """Return the routes of examples and feedback."""
    every = "/adapters/{adapter}/examples"
    one = f"{every}/{{example:path}}"
    return [
        get(every, examples.list_examples, "adapt", returns(ExamplesPage, 404)),
        delete(
            every,
            examples.delete_examples,
            "adapt",
            returns(RemovalResponse, 404, 409, 422, 429),
        ),
        get(one, examples.get_example, "adapt", returns(ExampleOut, 404)),
        delete(one, examples.delete_example, "adapt", returns(RemovalResponse, 404, 409, 429)),
        patch(
            one,
            examples.amend_example,
            "adapt",
            returns(AdaptResponse, 400, 404, 409, 415, 422, 429),
            body=once(body(requests.AmendRequest), 200),
        ),
        post(
            "/adapters/{adapter}/feedback",
            examples.send_feedback,
            "adapt",
            returns(AdaptResponse, 400, 404, 409, 415, 422, 429),
            body=once(body(requests.FeedbackRequest, "inputs"), 200),
        ),
    ]


def job_routes(jobs: JobEndpoints) -> list[DeclaredRoute]:
    """Return the routes of jobs."""
    return [
        get("/jobs", jobs.list_jobs, "adapt", returns(JobsOut, 422)),
        get("/jobs/{job}", jobs.get_job, "adapt", returns(JobOut, 404)),
        get(
            "/jobs/{job}/events",
            jobs.stream_job_events,
            "adapt",
            returns("text/event-stream", 404, 429),
            response_class=Response,
        ),
        post("/jobs/{job}/cancel", jobs.cancel_job, "adapt", returns(JobOut, 404, 409)),
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
            body=body(tenant_requests.TenantRequest),
            status_code=201,
        ),
        get("/tenants", tenants.list_tenants, "operator", returns(TenantsOut, 403)),
        get(one, tenants.get_tenant, "admin", returns(TenantOut, 404)),
        delete(one, tenants.erase_tenant, "operator", returns(ErasureOut, 403, 404)),
        put(
            f"{one}/quotas",
            tenants.set_quotas,
            "operator",
            returns(TenantOut, 403, 404, 415, 422),
            body=body(tenant_requests.QuotasIn),
        ),
        get(keys, tenants.list_keys, "admin", returns(KeysOut, 404)),
        post(keys, tenants.create_key, "admin", made, body=body(tenant_requests.KeyRequest), status_code=201),
        post(
            f"{keys}/{{key}}/rotate",
            tenants.rotate_key,
            "admin",
            made,
            body=body(tenant_requests.RotateRequest),
            status_code=201,
        ),
        delete(f"{keys}/{{key}}", tenants.revoke_key, "admin", returns(KeyOut, 404)),
    ]


def operation_routes(operations: OperationEndpoints) -> list[DeclaredRoute]:
    """Return the routes about the service itself."""
    return [
        get("/backbones", operations.list_backbones, "key", returns(BackbonesOut)),
        # Prometheus scrapes this route, and its configuration should not hold a key.
        get("/metrics", operations.get_metrics, "nothing", returns("text/plain"), response_class=Response),
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
