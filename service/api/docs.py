"""The API's documentation page, with the assets that BentoML ships instead of a content delivery network."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import bentoml
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.routing import APIRoute
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from service.edge.access import Access, access_of, needs

_ASSETS = Path(bentoml.__file__).parent / "_internal" / "server" / "static_content"
_SERVED = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-light-32x32.png": "image/png",
}


def add_docs(app: FastAPI) -> None:
    """Serve /docs from local files, and the app's OpenAPI document with the key that each route needs.

    All of it is static and the same for every caller. Browsers fetch it, so it needs no key.
    """

    @app.get("/", include_in_schema=False)
    @needs("nothing")
    async def index() -> RedirectResponse:
        return RedirectResponse("docs")

    @app.get("/docs", include_in_schema=False)
    @needs("nothing")
    async def page() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="docs/favicon-light-32x32.png",
        )

    @app.get("/openapi.json", include_in_schema=False)
    @needs("nothing")
    async def document() -> Response:
        return Response(rendered(), media_type="application/json")

    @cache
    def rendered() -> bytes:
        return to_json(app.openapi())

    @app.get("/docs/{asset}", include_in_schema=False)
    @needs("nothing")
    async def asset(asset: str) -> FileResponse:
        if asset not in _SERVED:
            raise HTTPException(404)
        return FileResponse(
            _ASSETS / asset, media_type=_SERVED[asset], headers={"Cache-Control": "max-age=86400"}
        )

    describe = app.openapi

    def openapi() -> dict[str, Any]:
        document = describe()
        schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["key"] = {"type": "http", "scheme": "bearer", "description": "Asked for when a key is set."}
        document["security"] = [{"key": []}, {}]
        for route in app.routes:
            if not isinstance(route, APIRoute) or not route.include_in_schema:
                continue
            operations = document["paths"][route.path_format]
            for method in operations.keys() & {name.lower() for name in route.methods or ()}:
                operations[method]["security"] = _security(access_of(route.endpoint))
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _security(access: Access) -> list[dict[str, list[str]]]:
    """Return the OpenAPI security requirement of a route, with the scope of the key as its role."""
    if access.need == "nothing":
        return []
    return [{"key": [] if access.need == "key" else [access.need]}, {}]
