"""Access with keys: every route, with every key, written in every way."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from benchmarks.harness.service_process import Serving
from service.api.routes import delete, get
from service.edge.auth import Authenticator
from service.edge.routes import Access, Need, RouteTable
from service.settings import Settings
from tests.support.service.client import Caller
from tests.support.service.edge_app import Shell

ADMIN = "0123456789abcdef0123456789abcdef"
SCOPES = ("predict", "adapt", "admin")
SECURITY = Path(__file__).resolve().parents[3] / "docs" / "background" / "security.md"
DECLARE = (
    "Declare a new route in service/api/routes.py, and name it in the table of docs/background/security.md. "
    "A route that declares nothing does not exist."
)

# Routes outside the API's document; the last three are BentoML's.
HIDDEN = {("GET", path) for path in ("/", "/docs", "/docs/errors", "/docs/{asset}", "/openapi.json")}
HEALTH = {("GET", path) for path in ("/livez", "/readyz", "/healthz")}

SUFFIXES = (
    "%0a", "%0d", "%00", "%20", "/", "//", ";x", "%2f", ".", "..", "?x", "%0d%0a", "%c2%85", "/..", "/.",
)  # fmt: skip
PREFIXES = (
    "/", "/.", "/%2e", "/predict/..", "/docs/..", "/docs/%2e%2e", "/docs/..%2f", "/metrics/..",
    "/openapi.json;", "/livez/..", "/v1", "http://localhost", "http://evil.example",
)  # fmt: skip
REFUSED = {
    "unauthorized",
    "scope_missing",
    "operator_only",
    "bad_request",
    "invalid_http",
    "not_found",
    "method_not_allowed",
}


def _code(problem: dict[str, Any]) -> str:
    """The stable code, in OpenAI's form too."""
    if "error" in problem:
        return str(problem["error"]["code"])
    return str(problem["code"])


def tricks(path: str) -> Iterator[str]:
    """Other ways to write the path, or nearly."""
    yield from (path + suffix for suffix in SUFFIXES)
    yield from (prefix + path for prefix in PREFIXES)
    yield f"/%{ord(path[1]):x}{path[2:]}" if len(path) > 1 else "/%2f"
    yield "/%25" + path[1:]
    yield path.upper()
    yield path.replace("/", "%2f").replace("%2f", "/", 1)
    yield path.replace("/", "\\")


class Callers:
    """The operator, a key for each scope, and a caller without a key. Closed by the fixture."""

    def __init__(self, url: str) -> None:
        self.address = urlsplit(url).netloc
        operator = Caller(url)
        operator.http.headers["Authorization"] = f"Bearer {ADMIN}"
        del operator.http.headers["X-Tenant"]
        operator.call("POST", "/tenants", 201, json={"tenant": "acme"})
        self.keys: dict[str, str | None] = {"none": None, "operator": ADMIN}
        for scope in SCOPES:
            made = operator.call("POST", "/tenants/acme/keys", 201, json={"scopes": [scope]})
            self.keys[scope] = made["key"]
        self.document = operator.call("GET", "/openapi.json")
        operator.http.close()
        self.connections = {name: http.client.HTTPConnection(self.address) for name in self.keys}

    def reach(self, name: str, method: str, path: str, **headers: str) -> bool:
        """True if the caller's request reaches a route."""
        connection = self.connections[name]
        connection.putrequest(method, path, skip_host=True)
        sent = {"Host": "localhost", "Content-Length": "0", **headers}
        if (key := self.keys[name]) is not None:
            sent["Authorization"] = f"Bearer {key}"
        for header, value in sent.items():
            connection.putheader(header, value)
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status < 500, (method, path, body)
        assert not 300 <= answer.status < 400 or answer.getheader("Location") == "docs", (method, path)
        if method == "OPTIONS" and answer.status == 204:
            # The methods of the path, which no route has told.
            return False
        if method == "HEAD":
            return answer.status not in (400, 401, 403, 404, 405)
        code = _code(json.loads(body)) if answer.status >= 400 else ""
        return code not in REFUSED

    def who_reach(self, method: str, path: str, **headers: str) -> set[str]:
        """The callers whose requests reach a route."""
        return {name for name in self.keys if self.reach(name, method, path, **headers)}

    def routes(self) -> dict[tuple[str, str], set[str]]:
        """All routes with those to whom they are open, as the document of the API says."""
        found = {}
        for path, operations in self.document["paths"].items():
            for method, operation in operations.items():
                if isinstance(operation, dict) and "responses" in operation:
                    found[method.upper(), path] = opened_to(operation["security"])
        return found | {route: set(self.keys) for route in HIDDEN}

    def close(self) -> None:
        for connection in self.connections.values():
            connection.close()


def opened_to(security: list[dict[str, list[str]]]) -> set[str]:
    if not security:
        return {"none", "operator", *SCOPES}
    roles = security[0]["key"]
    return {"operator", *(roles or SCOPES)}


def real(template: str) -> str:
    """A path of the route, to nothing that there is, except for the page's files."""
    path = template.replace("{asset}", "swagger-ui.css").replace("{version}", "1").replace("{job}", "0" * 32)
    return re.sub(r"\{\w+\}", "nothing", path)


@pytest.fixture(scope="module")
def callers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callers]:
    environment = {"TOPWORK_ADMIN_KEY": ADMIN, "TOPWORK_WORKERS": "0"}
    with Serving(tmp_path_factory.mktemp("doors"), environment=environment) as serving:
        found = Callers(serving.url)
        yield found
        found.close()


def test_a_route_opens_to_those_for_whom_it_is_declared(callers: Callers) -> None:
    for (method, path), expected in callers.routes().items():
        assert callers.who_reach(method, real(path)) == expected, f"{method} {path}"


def test_the_table_of_the_documentation_is_that_of_the_routes(callers: Callers) -> None:
    kinds = {"no key": {*callers.keys}, "any key": {"operator", *SCOPES}, "the admin key": {"operator"}}
    kinds |= {f"`{scope}`": {"operator", scope} for scope in SCOPES}
    told: dict[tuple[str, str], set[str]] = {}
    for kind, opened in kinds.items():
        (row,) = re.findall(rf"^\| {re.escape(kind)} \|(.*)\|$", SECURITY.read_text(), re.MULTILINE)
        for methods, path in re.findall(r"`([A-Z, ]+) (/[^`]*)`", row):
            told |= {(method, path): opened for method in methods.split(", ")}
    assert told == callers.routes() | {route: set(callers.keys) for route in HEALTH}, DECLARE


def test_no_other_way_to_write_a_path_opens_more(callers: Callers) -> None:
    """Every route × every key × every trick, with its method, with HEAD and with OPTIONS."""
    plain = {(method, real(path)): opened for (method, path), opened in callers.routes().items()}
    for path in {path for _, path in plain}:
        plain["HEAD", path] = plain.get(("GET", path), set())
        plain["OPTIONS", path] = set()
    asked = [(method, path, trick) for method, path in plain for trick in tricks(path)]
    # These are of another route, whose tenant they name.
    named = {(method, f"/tenants/{name}", "admin") for method in ("GET", "HEAD") for name in (".", "..")}

    def opened(name: str) -> list[tuple[str, str, str]]:
        return [
            (method, trick, name)
            for method, path, trick in asked
            if callers.reach(name, method, trick) and name not in plain[method, path]
        ]

    with ThreadPoolExecutor(len(callers.keys)) as pool:
        found = {one for part in pool.map(opened, callers.keys) for one in part}
    assert len(asked) > 2_500
    assert found - named == set()


@pytest.mark.parametrize(
    "header",
    ["X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override", "X-Original-URL", "X-Rewrite-URL",
     "X-Forwarded-Prefix", "X-Forwarded-Path", "X-Forwarded-Host", "Forwarded", "X-Original-Method"],
)  # fmt: skip
def test_no_header_makes_another_request_of_it(callers: Callers, header: str) -> None:
    for value in ("DELETE", "/adapters/nothing", "/tenants", "host=localhost", "/metrics"):
        for method, path in (("POST", "/adapt"), ("GET", "/jobs"), ("GET", "/tenants"), ("GET", "/adapters")):
            opened = callers.routes()[method, path]
            assert callers.who_reach(method, path, **{header: value}) == opened, (method, path, value)


def test_control_characters_in_a_path_are_refused(callers: Callers) -> None:
    client = Caller(f"http://{callers.address}")
    client.http.headers["Authorization"] = f"Bearer {ADMIN}"
    with client.http:
        for path in ("/adapt%0a", "/adapters/a%0db", "/adapters/a/examples/%00", "/%7f", "/jobs%c2%85"):
            assert client.code("GET", path, 400) == "bad_request"
        # Other names with percent signs are not refused.
        assert client.code("GET", "/adapters/a/examples/a%20%2f%c3%a9", 404) == "unknown_adapter"


async def nothing() -> None:
    """An endpoint."""


ROUTES = (get("/things", nothing, "key"), delete("/things", nothing, "adapt"))


@pytest.mark.parametrize(
    ("method", "path", "need"),
    [
        ("GET", "/things", "key"),
        ("HEAD", "/things", "key"),
        ("DELETE", "/things", "adapt"),
        # No route answers these: a later layer that reads another method opens nothing.
        ("PATCH", "/things", "adapt"),
        ("OPTIONS", "/things", "adapt"),
        ("GET", "/nowhere", "key"),
        ("GET", "/things/", "key"),
    ],
)
def test_a_route_needs_what_it_declares(method: str, path: str, need: Need) -> None:
    _, access = RouteTable(ROUTES).find({"type": "http", "method": method, "path": path})
    assert access.need == need


@pytest.mark.anyio
@pytest.mark.parametrize("key", [None, ADMIN])
async def test_a_route_that_declares_nothing_does_not_exist(tmp_path: Path, key: str | None) -> None:
    """The operator cannot call it either."""
    shell = Shell(Settings(home=tmp_path, admin_key=key, access_log=False))
    called = []

    @shell.app.api_route("/secret", methods=["GET", "POST"])
    async def secret() -> None:
        called.append("api_route")

    shell.app.router.routes.append(Route("/plain", lambda request: called.append("plain")))

    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        called.append("mounted")

    shell.app.mount("/mounted", mounted)
    guard = Authenticator(shell.settings.admin_key, ("127.0.0.1",))
    shell.edge.open(
        shell.app, shell.app.routes, settings=shell.settings, guard=guard, observe=shell.metrics.request
    )
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with shell.client(**headers) as client:
        assert (await client.get("/things/one")).status_code == 200
        for path in ("/secret", "/plain", "/mounted", "/mounted/on"):
            for method in ("GET", "HEAD", "POST", "OPTIONS"):
                assert (await client.request(method, path)).status_code == 404, (method, path)
    assert called == []


def test_predictions_and_reading_change_nothing() -> None:
    assert [Access("predict").may_change(method) for method in ("GET", "POST")] == [False, False]
    assert [Access("key").may_change(method) for method in ("GET", "POST")] == [False, True]
