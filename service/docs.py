"""The API's documentation page, without a content delivery network:

The assets are those that BentoML ships.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bentoml
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse

_ASSETS = Path(bentoml.__file__).parent / "_internal" / "server" / "static_content"
_SERVED = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-light-32x32.png": "image/png",
}


def add_docs(app: FastAPI) -> None:
    """Serves /docs from local files, and names the key in the app's one OpenAPI document."""

    @app.get("/", include_in_schema=False)
    async def index() -> RedirectResponse:
        return RedirectResponse("docs")

    @app.get("/docs", include_in_schema=False)
    async def page() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="docs/favicon-light-32x32.png",
        )

    @app.get("/docs/{asset}", include_in_schema=False)
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
        return document

    app.openapi = openapi  # type: ignore[method-assign]
