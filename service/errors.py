"""One error format (RFC 9457, application/problem+json), and one table from kinds of errors to statuses."""

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

from adapters.redaction import leaks_internals
from models.errors import (
    Conflict,
    DomainError,
    InternalFailure,
    Invalid,
    NotFound,
    Overloaded,
    PreconditionFailed,
    StorageFull,
    TimedOut,
    TooLarge,
    Unavailable,
)

logger = logging.getLogger("topwork")

TYPE_PREFIX = "/docs/errors#"
"""Start of a problem's `type`, which links to the entry of its code in the service's own reference."""
INVALID = "The request is not valid. `errors` says where and why."
"""Detail of a problem whose `errors` say what is wrong."""
MOST_ERRORS = 100  # entries of `errors` in one answer

STATUSES: dict[type[DomainError], int] = {
    Invalid: 422,
    NotFound: 404,
    Conflict: 409,
    PreconditionFailed: 412,
    TooLarge: 413,
    Overloaded: 429,
    InternalFailure: 500,
    Unavailable: 503,
    TimedOut: 504,
    StorageFull: 507,
}
"""HTTP status of each kind of error. Any other exception is a 500 that says nothing."""


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
        "code": code,
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
            for item in error.errors()[:MOST_ERRORS]
        ]
        return _Refusal(422, "invalid_request", INVALID, found)
    if isinstance(error, HTTPException):
        phrase = HTTPStatus(error.status_code).phrase
        code = phrase.lower().replace(" ", "_").replace("-", "_")
        detail = error.detail if error.detail != phrase else _HINTS.get(error.status_code, phrase)
        return _Refusal(error.status_code, code, detail, headers=error.headers)
    kind = next((kind for kind in STATUSES if isinstance(error, kind)), None)
    if kind is None or not isinstance(error, DomainError):
        return _Refusal(500, "internal_error", _withheld(error, request_id))
    detail, errors = error.detail, error.errors
    if kind is InternalFailure or any(map(leaks_internals, (detail, *_details(errors)))):
        detail, errors = _withheld(error, request_id), ()
    wait = error.retry_after
    if wait is None and kind in (Overloaded, Unavailable):
        wait = 1.0
    headers = {} if wait is None else {"Retry-After": str(max(1, math.ceil(wait)))}
    return _Refusal(STATUSES[kind], error.code, detail, errors, headers)


def _withheld(error: Exception, request_id: str) -> str:
    """Log the error, and return the detail that stands for its message."""
    logger.error("request %s failed", request_id, exc_info=error)
    return f"The service failed. Its log has the cause under {request_id}."


def _details(errors: Sequence[Mapping[str, str]]) -> list[str]:
    return [error["detail"] for error in errors]


_HINTS = {
    404: "There is no such path. /docs lists the paths.",
    405: "The path exists, but not with this method. The header Allow lists its methods.",
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

    for cls in (Problem, RequestValidationError, HTTPException, DomainError, Exception):
        app.add_exception_handler(cls, answer)
