"""Rules for every route, generated from the service's own document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import Depends

from service.api.operations import PageEndpoints
from service.api.routes import get, page_routes
from service.edge.routes import Body, Contract, RouteTable
from tests.support.service.client import Caller, reviews

METHODS = ("get", "put", "post", "patch", "delete")
# Pages that a browser opens; no document lists them.
PAGES = ("/", "/docs", "/docs/swagger-ui.css", "/openapi.json")
NAMES = {"adapter": "films", "version": "1", "example": "good1", "model": "minilm-l6-v2"}
OPENAI = {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def taught(server: str) -> Iterator[Caller]:
    found = Caller(server)
    with found.http:
        found.adapt("films", reviews())
        yield found


@pytest.fixture(scope="module")
def routes(taught: Caller) -> dict[str, dict[str, Any]]:
    """All documented paths, with values in the place of their parameters, and their operations."""
    paths: dict[str, dict[str, Any]] = taught.call("GET", "/openapi.json")["paths"]
    assert len(paths) > 20
    tenant = taught.tenant
    return {
        re.sub(r"\{(\w+)\}", lambda one: NAMES.get(one[1], tenant if one[1] == "tenant" else "x"), path): {
            method: operation for method, operation in operations.items() if method in METHODS
        }
        for path, operations in paths.items()
    } | {page: {"get": {}} for page in PAGES}


def code_of(answer: httpx.Response) -> str:
    found = answer.json()
    return str(found["error"]["code"] if "error" in found else found["code"])


def test_no_route_takes_a_query_parameter_that_it_does_not_have(taught: Caller, routes: Any) -> None:
    for path, operations in routes.items():
        for method, operation in operations.items():
            answer = taught.http.request(method, f"{path}?no_such_parameter=1")
            assert answer.status_code == 422, (method, path, answer.text)
            assert code_of(answer) == "invalid_request"
            (told,) = answer.json()["errors"]
            assert (told["pointer"], told["code"]) == ("/query/no_such_parameter", "unknown_parameter")
            for one in operation.get("parameters", ()):
                assert one["in"] != "query" or one["name"] in told["detail"]


def test_a_parameter_that_is_nearly_one_is_named_with_the_right_one(taught: Caller) -> None:
    problem = taught.call("GET", "/adapters?limt=3", 422)
    assert "Did you mean `limit`? There are: cursor, limit." in problem["errors"][0]["detail"]
    problem = taught.call("GET", "/jobs?limit=0", 422)
    assert [one["pointer"] for one in problem["errors"]] == ["/query/limit"]


def test_with_a_json_body_there_is_no_query(taught: Caller) -> None:
    """`version` would else be passed over, and the live version answer."""
    body = {"adapter": "films", "inputs": ["Lovely"]}
    problem = taught.call("POST", "/predict?version=7", 422, json=body)
    assert [one["pointer"] for one in problem["errors"]] == ["/query/version"]


def test_head_is_answered_as_get_without_a_body(taught: Caller, routes: Any) -> None:
    changing = {"x-request-id", "date"}
    for path in (path for path, operations in routes.items() if "get" in operations):
        with taught.http.stream("GET", path) as get:
            pass
        head = taught.http.head(path)
        assert head.status_code == get.status_code, path
        assert head.content == b""
        # The time and the counts in these change their length.
        own = changing | ({"content-length"} if path in ("/metrics",) else set())
        assert {name: one for name, one in head.headers.items() if name not in own} == {
            name: one for name, one in get.headers.items() if name not in own
        }, path
        assert path == "/metrics" or int(head.headers.get("content-length", -1)) == int(
            get.headers.get("content-length", -1)
        )


def test_options_and_other_methods_are_told_what_there_is(taught: Caller, routes: Any) -> None:
    for path, operations in routes.items():
        there = {method.upper() for method in operations} | {"OPTIONS"}
        there |= {"HEAD"} if "GET" in there else set()
        answer = taught.http.options(path)
        assert (answer.status_code, answer.content) == (204, b""), path
        assert set(answer.headers["allow"].split(", ")) == there, path
        for method in {"GET", "HEAD", "PUT", "POST", "PATCH", "DELETE", "TRACE", "PROPFIND"} - there:
            answer = taught.http.request(method, path)
            assert answer.status_code == 405, (method, path)
            assert set(answer.headers["allow"].split(", ")) == there, (method, path)
            assert method == "HEAD" or code_of(answer) == "method_not_allowed"


def test_a_head_of_what_streams_for_minutes_ends_at_once(taught: Caller) -> None:
    upload = "\n".join(f'{{"text": "text {number}", "label": "{number % 2}"}}' for number in range(50))
    headers = {"Content-Type": "application/x-ndjson"}
    job = taught.call("POST", "/adapt?adapter=streamed", 202, content=upload, headers=headers)["id"]
    answer = taught.http.head(f"/jobs/{job}/events", timeout=10.0)
    assert answer.headers["content-type"].startswith("text/event-stream")
    # Its slot is free again.
    for _ in range(12):
        assert taught.http.head(f"/jobs/{job}/events").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "request_", "status", "code"),
    [
        ("GET", "/v1", {}, 404, "not_found"),
        ("GET", "/v1/nothing", {}, 404, "not_found"),
        ("POST", "/v1/chat/completions", {"json": {}}, 404, "not_found"),
        ("GET", "/v1/models/gpt-4", {}, 404, "model_not_found"),
        ("GET", "/v1/models/efficientnet-lite0", {}, 404, "model_not_found"),
        ("GET", "/v1/models?limit=1", {}, 422, "invalid_request"),
        ("DELETE", "/v1/models/minilm-l6-v2", {}, 405, "method_not_allowed"),
        ("GET", "/v1/embeddings", {}, 405, "method_not_allowed"),
        ("POST", "/v1/embeddings", {"content": b"{"}, 415, "unsupported_media_type"),
        ("POST", "/v1/embeddings", {"json": {}}, 422, "invalid_request"),
        ("POST", "/v1/embeddings", {"headers": {"Host": "evil.example"}}, 403, "host_refused"),
        ("POST", "/v1/embeddings", {"headers": {"X-Tenant": "NO"}}, 422, "invalid_tenant"),
    ],
)
def test_errors_below_v1_have_openai_s_form(
    taught: Caller, method: str, path: str, request_: Any, status: int, code: str
) -> None:
    answer = taught.http.request(method, path, **request_)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error.keys() == OPENAI
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"
    assert answer.headers["x-request-id"]


def test_a_route_s_rule_has_what_its_dependencies_and_its_document_have() -> None:
    async def page(limit: int = 3, cursor: str | None = None) -> None: ...

    async def things(name: str, colour: str, page: None = Depends(page)) -> None: ...

    body = Body("none", {"parameters": [{"name": "raw", "in": "query"}, {"name": "h", "in": "header"}]})
    route = get("/things/{name}", things, "key", body=body)
    assert route.parameters == {"limit", "cursor", "colour", "raw"}
    assert RouteTable([route]).allowed("/things/one") == ["GET", "HEAD", "OPTIONS"]
    assert RouteTable([route]).allowed("/other") == []


@pytest.mark.anyio
async def test_an_error_on_the_way_of_a_head_reaches_its_caller() -> None:
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    (route,) = [route for route in page_routes(PageEndpoints()) if route.path == "/docs"]
    contract = Contract(failing, RouteTable([route]))
    scope = {"type": "http", "method": "HEAD", "path": "/docs", "query_string": b"", "route": route}
    with pytest.raises(ZeroDivisionError):
        await contract(scope, None, None)  # type: ignore[arg-type]
