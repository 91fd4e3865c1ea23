"""The FastAPI application: its routes, and the endpoints behind them.

Errors become responses in service/errors.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI

from service import __version__, errors
from service.api.adapt import AdaptEndpoints
from service.api.adapters import AdapterEndpoints
from service.api.examples import ExampleEndpoints
from service.api.idempotency import IdempotencyGuard
from service.api.jobs import Events, JobEndpoints
from service.api.openapi import describe
from service.api.operations import OperationEndpoints, PageEndpoints
from service.api.predict import OpenAIEndpoints, PredictEndpoints
from service.api.routes import (
    adapter_routes,
    example_routes,
    job_routes,
    learning_routes,
    openai_routes,
    operation_routes,
    page_routes,
    tenant_routes,
)
from service.api.tenants import TenantEndpoints
from service.components import Components
from service.edge.routes import DeclaredRoute
from service.payloads.reader import RequestReader
from service.server.process import told_to_end

_TAGS = [
    {
        "name": "Learning and prediction",
        "description": "Examples in, a version out; inputs in, predictions out.",
    },
    {"name": "OpenAI", "description": "Embeddings for clients of OpenAI's API."},
    {"name": "Adapters", "description": "Adapters, their versions, and the version that is live."},
    {"name": "Examples", "description": "The kept examples of an adapter, and feedback."},
    {"name": "Jobs", "description": "Work that outlives its request: fine-tunes and bulk uploads."},
    {"name": "Tenants", "description": "Tenants, their quotas and their keys."},
    {"name": "Operation", "description": "What the service runs, and how it does."},
]
_DESCRIPTION = """\
One frozen, pretrained backbone serves all tenants. A tenant posts a few labelled examples to `/adapt` and
gets a private head back; `/predict` answers with it.

Errors are `application/problem+json` (RFC 9457): `code` names the error, and `type` links to its explanation.
"""


def build_api(components: Components) -> FastAPI:
    """Return the application. Its endpoints hold no state; all state is in the components."""
    settings = components.settings
    reader = RequestReader(
        max_examples=settings.max_examples,
        max_labels=settings.max_labels,
        max_inputs=settings.max_inputs,
        max_openai_inputs=settings.max_openai_inputs,
    )
    guard = IdempotencyGuard(components.registry.replies)
    # A stream ends by itself before the edge aborts it.
    events = Events(components.submitter, 0.9 * settings.request_timeout)
    components.closing.enter_context(told_to_end(events.close))
    catalog, editor, eraser = components.catalog, components.editor, components.eraser
    tenants = TenantEndpoints(components.registry.tenants, eraser, components.keyring, reader)
    return application(
        [
            *tagged(
                "Learning and prediction",
                learning_routes(
                    AdaptEndpoints(
                        components.pipeline, components.submitter, components.uploads, reader, guard
                    ),
                    PredictEndpoints(components.predictor, reader),
                ),
            ),
            *tagged("OpenAI", openai_routes(OpenAIEndpoints(components.predictor, reader))),
            *tagged(
                "Adapters",
                adapter_routes(
                    AdapterEndpoints(
                        catalog,
                        components.rebaser,
                        components.restorer,
                        components.exporter,
                        eraser,
                        reader,
                        guard,
                    )
                ),
            ),
            *tagged("Examples", example_routes(ExampleEndpoints(catalog, editor, reader, guard))),
            *tagged("Jobs", job_routes(JobEndpoints(components.submitter, events))),
            *tagged("Tenants", tenant_routes(tenants)),
            *tagged(
                "Operation",
                operation_routes(
                    OperationEndpoints(components.batchers, components.surveyor.measured, components.metrics)
                ),
            ),
            *page_routes(PageEndpoints()),
        ]
    )


def application(routes: Sequence[DeclaredRoute]) -> FastAPI:
    """Return an application with these routes, with this service's error format and OpenAPI document."""
    # A redirect to the path without its trailing slash would repeat the host that the caller sent.
    api = FastAPI(
        title="Topwork",
        version=__version__,
        summary="Adapt on posted examples, predict over REST.",
        description=_DESCRIPTION,
        license_info={"name": "Apache License 2.0", "identifier": "Apache-2.0"},
        servers=[{"url": "/", "description": "This service."}],
        openapi_tags=_TAGS,
        routes=list(routes),
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    errors.install(api)
    describe(api)
    return api


def tagged(tag: str, routes: list[DeclaredRoute]) -> list[DeclaredRoute]:
    """Return the routes, listed under one heading in the documentation."""
    for route in routes:
        route.tags = [tag]
    return routes
