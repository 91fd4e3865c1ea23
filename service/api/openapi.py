"""The parts of the OpenAPI document that FastAPI cannot infer: bodies that the routes read themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, TypeAdapter

from service.edge.routes import Answers, Body, BodyKind, DeclaredRoute
from service.errors import is_openai
from service.payloads import requests, tenants
from service.payloads.responses.answer import ProblemOut
from service.payloads.responses.jobs import JobOutcome
from service.payloads.responses.openai import OpenAIProblem
from service.payloads.schema import NAME_PATTERN

_REF = "#/components/schemas/{model}"
_REQUESTS: tuple[type[BaseModel], ...] = (
    requests.AdaptRequest,
    requests.PredictRequest,
    requests.EmbedRequest,
    requests.OpenAIRequest,
    requests.PromoteRequest,
    requests.FeedbackRequest,
    requests.AmendRequest,
    requests.RebaseRequest,
    tenants.TenantRequest,
    tenants.QuotasIn,
    tenants.KeyRequest,
    tenants.RotateRequest,
)
_PROBLEMS = (ProblemOut, OpenAIProblem)
# Statuses that the edge may return for any request: it is malformed, has no key or the wrong one, is too slow
# or too large, exceeds a limit, or cannot be answered now or in time.
_ANYWHERE = (400, 401, 403, 408, 413, 422, 429, 431, 503, 504)
_REFUSALS = {
    400: "The request is malformed.",
    401: "The key is missing, unknown or expired.",
    403: "The key may not do this.",
    404: "What the path or the body names does not exist.",
    408: "The request came too slowly.",
    409: "The request contradicts the present state.",
    412: "The entity tag in If-Match is no longer the present one.",
    413: "The request is too large.",
    415: "The body's media type is not read here.",
    422: "The request, or a part of it, cannot be used; `errors` names the parts.",
    429: "A limit is reached; send the request again later.",
    431: "The header is too large.",
    503: "The service cannot answer now; send the request again later.",
    504: "The request took too long.",
}
_LATER = (429, 503)
_RETRY_AFTER = {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds to wait."}
_METHODS = {"get", "put", "post", "patch", "delete"}
_FASTAPIS_OWN = ("HTTPValidationError", "ValidationError")
_FILES = "Inputs as files; a file named `label/name.jpg` has that label. The other fields are form fields."
_IN_QUERY = (
    "Its other fields are in the query string; of a CSV table also text_column, label_column, labels_column, "
    "target_column, id_column and group_column, where columns have other names."
)
_UPLOAD = {"type": "string", "format": "binary", "description": _IN_QUERY}
_UPLOADS = {media: {"schema": _UPLOAD} for media in ("application/x-ndjson", "text/csv", "application/zip")}
_RAW = {
    "image/*": {"schema": {"type": "string", "format": "binary"}},
    "text/plain": {"schema": {"type": "string"}},
}


def _json(model: type) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}


def body(
    model: type[BaseModel],
    kind: BodyKind = "small",
    *,
    files: str | None = None,
    form: type[BaseModel] | None = None,
    query: type[BaseModel] | None = None,
    bulk: type[BaseModel] | None = None,
) -> Body:
    """Return the declaration of a JSON body.

    `files`: the field that a multipart body sends as files. `form`: the model of its other fields, if it is
    another one. `query`: the body may be one raw input; the other
    fields of this model are then in the query string. `bulk`: the model of a bulk upload, likewise.
    """
    content: dict[str, Any] = _json(model)
    if files is not None:
        content["multipart/form-data"] = {"schema": _form(form or model, files)}
    extra: dict[str, Any] = {"requestBody": {"required": True, "content": content}}
    if bulk is not None:
        content |= _UPLOADS
        extra["parameters"] = _in_query(bulk, "examples", "With multipart or a bulk upload.")
    if query is not None:
        content |= _RAW
        extra["parameters"] = _in_query(query, "inputs", "With multipart or a raw body.")
    return Body(kind, extra)


def _in_query(model: type[BaseModel], left_out: str, description: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "query", "schema": schema, "description": description}
        for name, schema in _plain_properties(model, left_out).items()
    ]


def once(body: Body, *statuses: int) -> Body:
    """Return the body of a route that takes an Idempotency-Key. `statuses`: of recorded answers."""
    extra = body.documented
    answered = {str(status): {"headers": {"Idempotency-Replayed": _REPLAYED}} for status in statuses}
    parameters = [*extra.get("parameters", ()), _KEY]
    return Body(body.kind, {**extra, "parameters": parameters, "responses": answered})


def calls_back(body: Body) -> Body:
    """Return the body of a route whose job tells its `callback` that it has ended."""
    called = {"job_ended": {"{$request.body#/callback}": _CALLED_BACK}}
    return Body(body.kind, {**body.documented, "callbacks": called})


def returns(answer: type | str, *refusals: int, status: int = 200) -> Answers:
    """Return the answers of a route that answers with a type or a media type, or with problems."""
    if isinstance(answer, str):
        return Answers({status: {"content": {answer: {}}}, **problems(*refusals)})
    return Answers({status: {"content": _json(answer)}, **problems(*refusals)}, (answer,))


def submits(job: type) -> Answers:
    """Return the answers of a route that may answer with a job, of which a callback may tell."""
    headers = {
        "Location": {"schema": {"type": "string"}, "description": "The path of the job."},
        "Retry-After": _RETRY_AFTER,
    }
    queued = {"content": _json(job), "headers": headers, "description": "A job was queued."}
    return Answers({202: queued}, (job, JobOutcome))


def returns_openai(answer: type, *refusals: int) -> Answers:
    """Return the answers of a route below /v1, whose problems are in OpenAI's format."""
    return Answers({200: {"content": _json(answer)}, **openai_problems(*refusals)}, (answer,))


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return `responses` of a route that may answer with problems of these statuses."""
    return _refusals(statuses, "application/problem+json", ProblemOut)


def openai_problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return `responses` of a route below /v1, whose problems are in OpenAI's format."""
    return _refusals(statuses, "application/json", OpenAIProblem)


def _refusals(statuses: Iterable[int], media: str, model: type) -> dict[int | str, dict[str, Any]]:
    content = {media: {"schema": {"$ref": _REF.format(model=model.__name__)}}}
    return {
        status: {
            "description": _REFUSALS[status],
            "content": content,
            **({"headers": {"Retry-After": _RETRY_AFTER}} if status in _LATER else {}),
        }
        for status in statuses
    }


def describe(app: FastAPI) -> None:
    """Add to the app's document what FastAPI cannot infer.

    That is the schemas of the bodies, the common problems, the X-Tenant header and the key of each route.
    """
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        declared = [route for route in app.routes if isinstance(route, DeclaredRoute)]
        answers = dict.fromkeys(model for route in declared for model in route.answers.models)
        _, definitions = TypeAdapter.json_schemas(
            [
                *((model, "validation", TypeAdapter(model)) for model in _REQUESTS),
                *((model, "serialization", TypeAdapter(model)) for model in (*answers, *_PROBLEMS)),
            ],
            ref_template=_REF,
        )
        document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        for path, operations in document["paths"].items():
            for method in _METHODS & operations.keys():
                _add_problems(operations[method]["responses"], is_openai(path))
            if not path.startswith("/tenants"):
                operations["parameters"] = [_TENANT]
        for name in _FASTAPIS_OWN:
            document["components"]["schemas"].pop(name, None)
        _add_security(document, declared)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


_TENANT = {
    "name": "X-Tenant",
    "in": "header",
    "schema": {"type": "string", "pattern": NAME_PATTERN, "default": "default"},
    "description": "The tenant whose adapters are meant. A tenant's own key decides it already.",
}


_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
    "description": "A name that you give to this one request. If the request is sent again with it within 24 "
    "hours, it gets the same answer and is not executed again. 409: the first one is still in progress. 422: "
    "the name was given to another request.",
}
_REPLAYED = {
    "schema": {"type": "string", "enum": ["true"]},
    "description": "Present if this is the stored answer to an earlier request with the same key.",
}


_CALLED_BACK = {
    "post": {
        "summary": "A job has ended",
        "description": "Sent once a job has ended, to the `callback` of its request. The headers are "
        "sent if the operator signs, as Standard Webhooks has it.",
        "operationId": "job_ended",
        "parameters": [
            {"name": name, "in": "header", "schema": {"type": kind}, "description": description}
            for name, kind, description in (
                ("webhook-id", "string", "The id of the job."),
                ("webhook-timestamp", "integer", "Seconds since 1970."),
                ("webhook-signature", "string", "`v1,` and a signature in base64; one for each secret."),
            )
        ],
        "requestBody": {"required": True, "content": _json(JobOutcome)},
        "responses": {
            "2XX": {"description": "Accepted."},
            "default": {"description": "Not accepted: sent again, three times in all."},
        },
    }
}


def _add_security(document: dict[str, Any], routes: Iterable[DeclaredRoute]) -> None:
    """Add the security requirement of each route, with the scope of the key as its role."""
    schemes = document["components"].setdefault("securitySchemes", {})
    schemes["key"] = {
        "type": "http",
        "scheme": "bearer",
        "description": "A key of a tenant or of the operator, if the service asks for keys. An operation "
        "names the scope of its key: predict, adapt, admin, or operator for the operator's own key.",
    }
    document["security"] = [{"key": []}, {}]
    for route in routes:
        if not route.include_in_schema:
            continue
        need = route.access.need
        security = [] if need == "nothing" else [{"key": [] if need == "key" else [need]}, {}]
        for method in route.methods or ():
            document["paths"][route.path_format][method.lower()]["security"] = security


def _add_problems(responses: dict[str, Any], openai: bool) -> None:
    """Add the problems that any path may answer with, and replace FastAPI's own form of a 422."""
    form = openai_problems if openai else problems
    for status, response in form(*_ANYWHERE).items():
        if str(status) == "422" or str(status) not in responses:
            responses[str(status)] = response


def _plain_properties(model: type[BaseModel], left_out: str) -> dict[str, Any]:
    """Return the properties that fit a form field or query parameter: no objects, and not `left_out`."""
    properties: dict[str, Any] = model.model_json_schema()["properties"]
    return {
        name: schema for name, schema in properties.items() if name != left_out and "$ref" not in str(schema)
    }


def _form(model: type[BaseModel], files: str) -> dict[str, Any]:
    items = {"type": "array", "items": {"type": "string", "format": "binary"}, "description": _FILES}
    return {"type": "object", "properties": {**_plain_properties(model, files), files: items}}
