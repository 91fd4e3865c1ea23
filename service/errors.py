"""One error format (RFC 9457, application/problem+json), and one table from exception classes to statuses."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from adapters.adaptation.commands import (
    AdapterFull,
    ContractChanged,
    ExamplesRejected,
    FingerprintMismatch,
    NothingToFit,
    WeightsNotForTask,
)
from adapters.adaptation.example_editor import InputsNotKept
from adapters.adaptation.rollback import CannotRestore
from adapters.examples.target import ExampleError
from adapters.examples.upload import BadUpload
from adapters.examples.validation import MixedInputs
from adapters.heads.head import CorruptHead
from adapters.jobs.callbacks import CallbackNotAllowed
from adapters.jobs.submission import CannotTune, TooFewExamples
from adapters.prediction.predictor import HeadMismatch, NoLiveVersion
from adapters.probe.fit import OneLabel, TooCostly
from adapters.processes.errors import FitFailed, FitterOverloaded, FitterUnavailable
from adapters.redaction import leaks_internals
from adapters.registry.erasures import TenantErased
from adapters.registry.errors import (
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
from adapters.registry.tenants import KeyNotInUse, QuotaExceeded, TenantExists, TooManyKeys, UnknownKey
from adapters.storage.artifact import CorruptArtifact, MissingArtifact, StoreFull, StoreUnavailable
from models.batching.request import BatcherClosed, DeadlineExceeded, EmbeddingFailed, Overloaded
from models.manifest import CorruptExport
from models.preprocess.decoder_child import DecoderUnavailable
from models.preprocess.limits import InputError
from models.protobuf import InvalidGraph
from models.spec import UnknownBackbone

logger = logging.getLogger("topwork")

TYPE_PREFIX = "urn:topwork:"
INVALID = "The request does not have the documented form."
"""Detail of a problem whose `errors` say what is wrong."""

# HTTP status of each domain exception and its subclasses. Any other exception is a 500.
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
    DecoderUnavailable: 503,
    FitterUnavailable: 503,
    RegistryUnavailable: 503,
    StoreUnavailable: 503,
    DeadlineExceeded: 504,
    StoreFull: 507,
}


class Problem(HTTPException):
    """An error of the service layer itself: `code` names it, `detail` says what to do.

    It is an HTTPException, because FastAPI replaces any other exception raised while reading a body by its
    own 400.
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
    """Return a problem as a JSON object."""
    return {
        "type": TYPE_PREFIX + code,
        "title": code.replace("_", " ").capitalize(),
        "status": status,
        "detail": detail,
        "request_id": request_id,
    }


@dataclass(frozen=True, slots=True)
class _Refusal:
    """The content of an error response. `errors`: the faulty parts, each as {pointer, code, detail}."""

    status: int
    code: str
    detail: str
    errors: Sequence[Mapping[str, str]] = ()
    headers: Mapping[str, str] | None = None


def is_openai(path: str) -> bool:
    """Whether the path is of the OpenAI-compatible API, whose clients only know OpenAI's error format."""
    return path == "/v1" or path.startswith("/v1/")


def respond(error: Exception, request_id: str, *, openai: bool = False) -> Response:
    """Return the response for any exception, as problem+json or in OpenAI's format.

    The message is withheld if the exception is an internal failure or the message leaks internals.
    """
    refusal = _refusal(error, request_id)
    body = (
        _openai_body(refusal)
        if openai
        else problem_body(refusal.status, refusal.code, refusal.detail, request_id)
    )
    if refusal.errors:
        body["errors"] = [dict(one) for one in refusal.errors]
    return Response(
        json.dumps(body),
        refusal.status,
        dict(refusal.headers or {}),
        "application/json" if openai else "application/problem+json",
    )


def _openai_body(refusal: _Refusal) -> dict[str, Any]:
    first = refusal.errors[0] if refusal.errors else None
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    message = refusal.detail
    if first is not None and first["detail"] != message:
        message = first["detail"] if message == INVALID else f"{message} {first['detail']}"
    return {
        "error": {
            "message": message,
            "type": "rate_limit_error" if refusal.status == 429 else kind,
            "param": None if first is None else first["pointer"],
            "code": refusal.code,
        }
    }


def _refusal(error: Exception, request_id: str) -> _Refusal:
    if isinstance(error, Problem):
        return _Refusal(error.status_code, error.code, error.detail, error.errors, error.headers)
    if isinstance(error, RequestValidationError):
        found = [
            {"pointer": pointer(item["loc"]), "code": str(item["type"]), "detail": str(item["msg"])}
            for item in error.errors()[:100]
        ]
        return _Refusal(422, "invalid_request", INVALID, found)
    if isinstance(error, HTTPException):
        phrase = HTTPStatus(error.status_code).phrase
        code = phrase.lower().replace(" ", "_").replace("-", "_")
        detail = error.detail if error.detail != phrase else _HINTS.get(error.status_code, phrase)
        return _Refusal(error.status_code, code, detail, headers=error.headers)
    status = next((STATUSES[cls] for cls in type(error).__mro__ if cls in STATUSES), None)
    detail = str(getattr(error, "detail", "") or error)
    errors: Sequence[Mapping[str, str]] = getattr(error, "errors", ())
    if status is None or status == 500 or any(map(leaks_internals, (detail, *_details(errors)))):
        logger.error("request %s failed", request_id, exc_info=error)
        detail, errors = f"The service failed. Its log has the cause under {request_id}.", ()
    if status is None:
        return _Refusal(500, "internal_error", detail)
    wait = getattr(error, "retry_after", None)
    if wait is None and status in (429, 503):
        wait = 1.0
    headers = {} if wait is None else {"Retry-After": str(max(1, math.ceil(wait)))}
    return _Refusal(status, str(getattr(error, "code", "error")), detail, errors, headers)


def _details(errors: Sequence[Mapping[str, str]]) -> list[str]:
    return [error["detail"] for error in errors]


_HINTS = {
    404: "There is no such path. /docs lists what there is.",
    405: "The path is there, but not with this method. The header Allow has its methods.",
}


def pointer(location: Sequence[str | int]) -> str:
    """Return a JSON pointer (RFC 6901) for a pydantic location.

    Outside the body it starts with the place, e.g. "query". Parts after the name of a parameter are dropped,
    because they are pydantic's own.
    """
    parts = list(location)
    if parts[:1] == ["body"]:
        del parts[0]
    elif parts and parts[0] in _PARAMETERS:
        del parts[2:]
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


_PARAMETERS = ("query", "path", "header", "cookie")


def request_id(request: Request) -> str:
    """Return the id that the edge gave to the request, also sent as X-Request-ID."""
    return str(request.scope.get("state", {}).get("request_id", ""))


def install(app: FastAPI) -> None:
    """Answer every exception of the app with a problem; see `respond`."""

    async def answer(request: Request, error: Exception) -> Response:
        return respond(error, request_id(request), openai=is_openai(request.scope["path"]))

    for cls in (Problem, RequestValidationError, HTTPException, Exception, *STATUSES):
        app.add_exception_handler(cls, answer)
