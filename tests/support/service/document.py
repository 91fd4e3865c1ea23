"""The routes of the API, and a strict reading of its answers."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

ROUTES = {
    ("post", "/adapt"),
    ("post", "/predict"),
    ("post", "/embed"),
    ("post", "/v1/embeddings"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{model}"),
    ("get", "/backbones"),
    ("get", "/metrics"),
    ("get", "/adapters"),
    ("get", "/adapters/{adapter}"),
    ("delete", "/adapters/{adapter}"),
    ("get", "/adapters/{adapter}/versions"),
    ("get", "/adapters/{adapter}/versions/{version}"),
    ("get", "/adapters/{adapter}/versions/{version}/export"),
    ("post", "/adapters/{adapter}/versions/{version}/restore"),
    ("put", "/adapters/{adapter}/aliases/live"),
    ("get", "/adapters/{adapter}/examples"),
    ("delete", "/adapters/{adapter}/examples"),
    ("get", "/adapters/{adapter}/examples/{example}"),
    ("patch", "/adapters/{adapter}/examples/{example}"),
    ("delete", "/adapters/{adapter}/examples/{example}"),
    ("post", "/adapters/{adapter}/feedback"),
    ("post", "/adapters/{adapter}/rebase"),
    ("get", "/jobs"),
    ("get", "/jobs/{job}"),
    ("get", "/jobs/{job}/events"),
    ("post", "/jobs/{job}/cancel"),
    ("get", "/tenants"),
    ("post", "/tenants"),
    ("get", "/tenants/{tenant}"),
    ("delete", "/tenants/{tenant}"),
    ("put", "/tenants/{tenant}/quotas"),
    ("get", "/tenants/{tenant}/keys"),
    ("post", "/tenants/{tenant}/keys"),
    ("post", "/tenants/{tenant}/keys/{key}/rotate"),
    ("delete", "/tenants/{tenant}/keys/{key}"),
}


def exactly(form: Any, value: Any) -> None:
    """Raise unless the value has the form, without a field that the form does not name."""
    TypeAdapter(form).validate_python(value, extra="forbid")
