"""The endpoints that operators and browsers open: backbones, metrics, and the documentation page.

The page's assets are those that BentoML ships, instead of a content delivery network's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path

from fastapi import Request
from fastapi.openapi.docs import get_swagger_ui_html
from markdown_it import MarkdownIt
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from adapters.threads import DATABASE
from models.batching.batcher import Batcher
from models.runtime.autotune import MeasuredPlan
from service.monitoring.metrics import CONTENT_TYPE, Metrics
from service.payloads.responses.backbones import render_backbones
from service.server.page_files import PAGE_FILES

_SERVED = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-light-32x32.png": "image/png",
}
_ERRORS = Path(__file__).with_name("errors.md")


class OperationEndpoints:
    """What the service says of itself to operators."""

    def __init__(
        self, batchers: Mapping[str, Batcher], measured: Mapping[str, MeasuredPlan], metrics: Metrics
    ) -> None:
        self._batchers = batchers
        self._measured = measured
        self._metrics = metrics

    async def list_backbones(self) -> Response:
        """List the backbones that can be adapted."""
        return render_backbones(self._batchers, self._measured)

    async def get_metrics(self) -> Response:
        """Return the metrics that Prometheus scrapes."""
        # Some gauges are read from the database.
        return Response(await DATABASE.run(self._metrics.render), media_type=CONTENT_TYPE)


class PageEndpoints:
    """The documentation page, its files and the OpenAPI document: static, and the same for every caller."""

    def __init__(self) -> None:
        self._document = b""

    async def index(self) -> RedirectResponse:
        """Redirect to the page."""
        return RedirectResponse("docs")

    async def page(self, request: Request) -> HTMLResponse:
        """Return the page."""
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=request.app.title,
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="docs/favicon-light-32x32.png",
        )

    async def document(self, request: Request) -> Response:
        """Return the OpenAPI document."""
        self._document = self._document or to_json(request.app.openapi())
        return Response(self._document, media_type="application/json")

    async def errors(self) -> HTMLResponse:
        """Return the reference of errors, to which the `type` of every problem links."""
        return HTMLResponse(_errors_page())

    async def asset(self, asset: str) -> FileResponse:
        """Return a file of the page. Raises a 404 for any other name."""
        if asset not in _SERVED:
            raise HTTPException(404)
        return FileResponse(
            PAGE_FILES / asset, media_type=_SERVED[asset], headers={"Cache-Control": "max-age=86400"}
        )


@cache
def _errors_page() -> str:
    """Return the reference of errors, in which each heading has its text as its anchor."""
    parser = MarkdownIt()
    tokens = parser.parse(_ERRORS.read_text("utf-8"))
    for heading, text in pairwise(tokens):
        if heading.type == "heading_open":
            heading.attrSet("id", text.content)
    body = parser.renderer.render(tokens, parser.options, {})
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Errors</title>{body}</html>'
