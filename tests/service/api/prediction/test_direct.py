"""Routes that are called straight answer as FastAPI would have them answer."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from models.batching.request import QueueFull
from service.api.app import application, post
from service.api.dependencies import Tenant, tenant_of
from service.api.direct import Direct
from service.edge.auth import Authenticator
from service.edge.gateway import Edge
from service.edge.routes import Body as Declared
from service.errors import Problem
from service.monitoring.metrics import Metrics
from service.settings import Settings


class Body(BaseModel):
    """Something to validate."""

    number: int


async def hot(request: Request) -> Response:
    body = await request.body()
    if body == b"problem":
        raise Problem(409, "a_problem", "Do something.", headers={"Retry-After": "7"})
    if body == b"overload":
        raise QueueFull(3.2)
    if body == b"bug":
        raise ZeroDivisionError("a secret of the inside")
    if body == b"invalid":
        Body.model_validate({"number": "x"})
    return Response(f"{await tenant_of(request)} {body.decode()}")


async def cold(request: Request, tenant: Tenant) -> Response:
    return Response(tenant)


ROUTES = [
    post("/hot", hot, "predict", body=Declared("inputs"), direct=True),
    post("/cold", cold, "key", body=Declared("inputs")),
]


def api() -> FastAPI:
    return application(ROUTES)


def client(app: FastAPI, tmp_path: Path, *, direct: bool) -> tuple[httpx.AsyncClient, Metrics]:
    edge, metrics = Edge(), Metrics()
    edge.open(
        Direct(app) if direct else app,
        app.routes,
        settings=Settings(home=tmp_path, access_log=False),
        guard=Authenticator(None, ("127.0.0.1",)),
        observe=metrics.request,
    )
    transport = httpx.ASGITransport(edge)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:3000"), metrics


@pytest.mark.anyio
@pytest.mark.parametrize("content", [b"", b"problem", b"overload", b"bug", b"invalid"])
async def test_it_answers_as_without(tmp_path: Path, content: bytes) -> None:
    found = []
    for direct in (True, False):
        http, metrics = client(api(), tmp_path, direct=direct)
        async with http:
            answer = await http.post("/hot", content=content, headers={"X-Request-Id": "one"})
        assert 'route="/hot"' in metrics.render().decode()
        found.append((answer.status_code, dict(answer.headers), answer.content))
    assert found[0] == found[1]
    assert b"secret" not in found[0][2]


@pytest.mark.anyio
async def test_everything_else_is_fastapi_s(tmp_path: Path) -> None:
    http, _ = client(api(), tmp_path, direct=True)
    async with http:
        assert (await http.post("/cold", headers={"X-Tenant": "one"})).text == "one"
        assert (await http.post("/hot", headers={"X-Tenant": "?"})).status_code == 422
        assert (await http.get("/hot")).status_code == 405
        assert (await http.post("/hot/")).status_code in (307, 404)


def test_only_what_takes_the_request_alone_can_be_called_straight() -> None:
    warm = post("/warm", cold, "predict", direct=True)
    with pytest.raises(ValueError, match="request alone"):
        Direct(application([*ROUTES, warm]))
