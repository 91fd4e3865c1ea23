"""One error format (RFC 9457, application/problem+json) and one table from exception classes to statuses."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from adapters.adapting import ContractChanged, ExamplesRejected, FingerprintMismatch, WeightsNotForTask
from adapters.admission import MixedInputs
from adapters.calling_back import CallbackNotAllowed
from adapters.curating import InputsNotKept
from adapters.erasing import TenantErased
from adapters.example import ExampleError
from adapters.fitter import FitFailed, FitterOverloaded, FitterUnavailable
from adapters.head import CorruptHead
from adapters.linear_probe import OneLabel, TooCostly
from adapters.onnx_head import InvalidGraph
from adapters.outward import tells_of_the_inside
from adapters.predicting import HeadMismatch, NoLiveVersion
from adapters.records import (
    AliasMoved,
    JobFinished,
    RegistryUnavailable,
    RevisionMoved,
    TooManyJobs,
    UnknownAdapter,
    UnknownExample,
    UnknownJob,
    UnknownTenant,
    UnknownVersion,
)
from adapters.revising import AdapterFull, NothingToFit
from adapters.rollback import CannotRestore
from adapters.store import CorruptArtifact, MissingArtifact, StoreFull, StoreUnavailable
from adapters.submitting import CannotTune, TooFewExamples
from adapters.tenants import KeyNotInUse, QuotaExceeded, TenantExists, TooManyKeys, UnknownKey
from adapters.uploaded import BadUpload
from models.manifest import CorruptExport
from models.preprocess import InputError
from models.request import BatcherClosed, DeadlineExceeded, EmbeddingFailed, Overloaded
from models.spec import UnknownBackbone

logger = logging.getLogger("topwork")

TYPE_PREFIX = "urn:topwork:"

# The status of each domain exception. A class that is not here, nor a subclass of one that is, is a 500.
STATUSES: dict[type[Exception], int] = {
    InputError: 422,
    ExampleError: 422,
    ExamplesRejected: 422,
    MixedInputs: 422,
    NothingToFit: 422,
    OneLabel: 422,
    TooFewExamples: 422,
    BadUpload: 422,
    CallbackNotAllowed: 422,
    WeightsNotForTask: 422,
    UnknownBackbone: 422,
    UnknownAdapter: 404,
    UnknownVersion: 404,
    UnknownExample: 404,
    UnknownJob: 404,
    UnknownTenant: 404,
    UnknownKey: 404,
    AdapterFull: 409,
    TenantExists: 409,
    TenantErased: 409,
    KeyNotInUse: 409,
    QuotaExceeded: 409,
    TooManyKeys: 409,
    CannotTune: 409,
    JobFinished: 409,
    ContractChanged: 409,
    FingerprintMismatch: 409,
    HeadMismatch: 409,
    InputsNotKept: 409,
    CannotRestore: 409,
    NoLiveVersion: 409,
    RevisionMoved: 409,
    AliasMoved: 412,
    TooCostly: 413,
    Overloaded: 429,
    FitterOverloaded: 429,
    TooManyJobs: 429,
    EmbeddingFailed: 500,
    FitFailed: 500,
    InvalidGraph: 500,
    CorruptHead: 500,
    CorruptExport: 500,
    CorruptArtifact: 500,
    MissingArtifact: 500,
    BatcherClosed: 503,
    FitterUnavailable: 503,
    RegistryUnavailable: 503,
    StoreUnavailable: 503,
    DeadlineExceeded: 504,
    StoreFull: 507,
}


class Problem(HTTPException):
    """A refusal that arises at the edge itself: `code` names it, `detail` says what to do.

    An HTTPException, because FastAPI hides any other that is raised while it reads a body behind a 400 of
    its own.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        errors: Sequence[Mapping[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, detail, dict(headers or {}))
        self.code = code
        self.errors = errors


def problem_body(status: int, code: str, detail: str, request_id: str) -> dict[str, Any]:
    """What a problem is, for JSON."""
    return {
        "type": TYPE_PREFIX + code,
        "title": code.replace("_", " ").capitalize(),
        "status": status,
        "detail": detail,
        "request_id": request_id,
    }


def problem_response(
    status: int,
    code: str,
    detail: str,
    *,
    request_id: str,
    errors: Sequence[Mapping[str, str]] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A problem+json response.

    `errors` are {pointer, code, detail}: which input item or field is to blame.
    """
    body = problem_body(status, code, detail, request_id)
    if errors:
        body["errors"] = [dict(error) for error in errors]
    return Response(
        json.dumps(body),
        status_code=status,
        headers=dict(headers or {}),
        media_type="application/problem+json",
    )


def respond(error: Exception, request_id: str) -> Response:
    """The response for any exception, without its message where that is a failure, or tells of the inside."""
    if isinstance(error, Problem):
        return problem_response(
            error.status_code,
            error.code,
            error.detail,
            request_id=request_id,
            errors=error.errors,
            headers=error.headers,
        )
    if isinstance(error, RequestValidationError):
        return _invalid_request(error, request_id)
    if isinstance(error, HTTPException):
        phrase = HTTPStatus(error.status_code).phrase
        code = phrase.lower().replace(" ", "_").replace("-", "_")
        return problem_response(
            error.status_code,
            code,
            error.detail if error.detail != phrase else _HINTS.get(error.status_code, phrase),
            request_id=request_id,
            headers=error.headers,
        )
    status = next((STATUSES[cls] for cls in type(error).__mro__ if cls in STATUSES), None)
    detail = str(getattr(error, "detail", "") or error)
    errors = getattr(error, "errors", ())
    if status is None or status == 500 or any(map(tells_of_the_inside, (detail, *_details(errors)))):
        logger.error("request %s failed", request_id, exc_info=error)
        detail, errors = f"The service failed. Its log has the cause under {request_id}.", ()
    if status is None:
        return problem_response(500, "internal_error", detail, request_id=request_id)
    retry_after = getattr(error, "retry_after", None)
    if retry_after is None and status in (429, 503):
        retry_after = 1.0
    return problem_response(
        status,
        str(getattr(error, "code", "error")),
        detail,
        request_id=request_id,
        errors=errors,
        headers={} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))},
    )


def _details(errors: Sequence[Mapping[str, str]]) -> list[str]:
    return [error["detail"] for error in errors]


_HINTS = {
    404: "There is no such path. /docs lists what there is.",
    405: "The path is there, but not with this method. /docs lists what there is.",
}


def _invalid_request(error: RequestValidationError, request_id: str) -> Response:
    errors = [
        {
            "pointer": pointer(item["loc"]),
            "code": str(item["type"]),
            "detail": str(item["msg"]),
        }
        for item in error.errors()[:100]
    ]
    return problem_response(
        422,
        "invalid_request",
        "The request does not have the documented form.",
        request_id=request_id,
        errors=errors,
    )


def pointer(location: Sequence[str | int]) -> str:
    """A JSON pointer (RFC 6901) from a pydantic location; what is not in the body begins with where."""
    parts = list(location[1:]) if location and location[0] == "body" else list(location)
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def request_id(request: Request) -> str:
    """The id that the edge gave to the request, also in its X-Request-ID header."""
    return str(request.scope.get("state", {}).get("request_id", ""))


def install(app: FastAPI) -> None:
    """Answer every exception of the app with problem+json."""

    async def answer(request: Request, error: Exception) -> Response:
        return respond(error, request_id(request))

    for cls in (Problem, RequestValidationError, HTTPException, Exception, *STATUSES):
        app.add_exception_handler(cls, answer)
