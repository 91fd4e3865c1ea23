"""Responses that are stored with a request's Idempotency-Key, and sent again when it is repeated."""

from __future__ import annotations

from pydantic_core import from_json, to_json
from starlette.responses import Response

from adapters.registry.idempotency import StoredReply
from service.payloads.responses.jobs import job_headers

REJECTED_KEPT = 100
"""Rejected examples that a stored response lists; the original response lists all."""
_SHORT = 4_096  # bytes; a shorter response has fewer rejected examples


def shorten(body: bytes) -> bytes:
    """Return the part of a response that is stored: at most REJECTED_KEPT rejected examples."""
    if len(body) < _SHORT:
        return body
    value = from_json(body)
    rejected = (value.get("examples") or {}).get("rejected", [])
    if len(rejected) <= REJECTED_KEPT:
        return body
    del rejected[REJECTED_KEPT:]
    return to_json(value)


def render_reply(found: StoredReply) -> Response:
    """Return the stored response to an earlier request with the same Idempotency-Key."""
    headers = {"Idempotency-Replayed": "true"}
    if found.status == 202:
        headers |= job_headers(from_json(found.body)["id"])
    return Response(found.body, found.status, headers, "application/json")
