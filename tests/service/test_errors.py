from __future__ import annotations

import ast
import asyncio
import gc
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy.exc import DBAPIError

from adapters.redaction import leaks_internals
from adapters.registry.erasures import TenantErased
from adapters.registry.errors import UnknownAdapter
from models.batching.request import QueueFull
from models.errors import CodedError, DomainError, InternalFailure
from service.edge.auth import Authenticator
from service.edge.channel import RequestChannel
from service.edge.gateway import Edge
from service.edge.routes import Body, DeclaredRoute
from service.errors import STATUSES, Problem, pointer, respond
from service.monitoring.metrics import Metrics
from service.server.scope import GONE, new_id
from service.settings import Settings
from tests.support.domain_errors import DOMAIN_ERRORS
from tests.support.service.edge_app import Shell


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(Settings(home=tmp_path, max_body_bytes=1000, request_timeout=0.2, access_log=False))


def is_problem(answer: Any, status: int, code: str) -> bool:
    body = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body["title"]
    assert body["detail"]
    return (answer.status_code, body["status"], body["type"]) == (status, status, f"/docs/errors#{code}")


@pytest.mark.anyio
async def test_an_unknown_path_and_a_wrong_method_are_problems(shell: Shell) -> None:
    async with shell.client() as client:
        assert is_problem(await client.get("/nowhere"), 404, "not_found")
        assert is_problem(await client.post("/livez"), 404, "not_found")
        answer = await client.delete("/things/1")
        assert is_problem(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == "GET, HEAD, OPTIONS"


@pytest.mark.anyio
async def test_an_invalid_body_names_the_field(shell: Shell) -> None:
    async with shell.client() as client:
        answer = await client.post("/validated", json={"items": [1, "x"]})
        assert is_problem(answer, 422, "invalid_request")
        assert [error["pointer"] for error in answer.json()["errors"]] == ["/items/1"]
        assert is_problem(await client.post("/validated", content=b"{"), 422, "invalid_request")


@pytest.mark.anyio
async def test_a_failure_is_a_500_that_tells_nothing_of_the_inside(
    shell: Shell, caplog: pytest.LogCaptureFixture
) -> None:
    async with shell.client() as client:
        answer = await client.post("/failing")
    assert is_problem(answer, 500, "internal_error")
    assert "secret" not in answer.text
    records = [record for record in caplog.records if record.name == "topwork"]
    assert len(records) == 1
    assert answer.json()["request_id"] in records[0].getMessage()


@pytest.mark.anyio
async def test_what_is_refused_leaves_nothing_for_the_garbage_collector(tmp_path: Path) -> None:
    """A refusal is most frequent when there is least time to clean up behind it."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/predict",
        "raw_path": b"/predict",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
    }

    async def refusing(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise QueueFull(1.0)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        pass

    edge = Edge()
    settings = Settings(home=tmp_path, access_log=False)

    async def endpoint() -> None:
        """The application answers by itself."""

    edge.open(
        refusing,
        [DeclaredRoute("POST", "/predict", endpoint, "predict", body=Body("inputs"))],
        settings=settings,
        guard=Authenticator(None, ["127.0.0.1"]),
        observe=Metrics().request,
    )
    gc.collect()
    before = exchanges()
    gc.disable()
    try:
        for _ in range(3):
            await edge({**scope, "extensions": {GONE: set()}}, receive, send)
        assert exchanges() <= before
    finally:
        gc.enable()


def exchanges() -> int:
    # isinstance would ask every object of every library for its class, and some warn when asked.
    return sum(type(one) is RequestChannel for one in gc.get_objects())


@pytest.mark.anyio
async def test_a_request_that_takes_too_long_is_a_504_and_stops(shell: Shell) -> None:
    async with shell.client() as client:
        assert is_problem(await client.post("/slow"), 504, "deadline_exceeded")
    assert shell.cancelled.is_set()


@pytest.mark.anyio
async def test_a_body_that_says_it_is_too_large_is_refused_unread(shell: Shell) -> None:
    async with shell.client() as client:
        assert is_problem(await client.post("/streamed", content=b"x" * 1001), 413, "body_too_large")
        assert (await client.post("/streamed", content=b"x" * 1000)).json() == {"bytes": 1000}


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/streamed", "/validated"])
async def test_a_body_that_turns_out_too_large_is_refused(shell: Shell, path: str) -> None:
    async def chunks() -> Any:
        for _ in range(11):
            yield b"x" * 100

    async with shell.client() as client:
        assert is_problem(await client.post(path, content=chunks()), 413, "body_too_large")


@pytest.mark.anyio
async def test_bodies_being_worked_on_are_bounded_together(tmp_path: Path) -> None:
    shell = Shell(Settings(home=tmp_path, max_body_bytes=1000, max_bodies_bytes=1500, access_log=False))
    async with shell.client() as client:
        slow = asyncio.create_task(client.post("/slow", content=b"x" * 1000))
        await asyncio.sleep(0.1)
        answer = await client.post("/streamed", content=b"x" * 501)
        assert is_problem(answer, 429, "overloaded")
        assert answer.headers["retry-after"] == "1"
        assert (await client.post("/streamed", content=b"x" * 500)).status_code == 200
        slow.cancel()
        await asyncio.wait([slow])
        assert (await client.post("/streamed", content=b"x" * 1000)).status_code == 200


@pytest.mark.anyio
async def test_a_caller_that_hangs_up_stops_its_work(shell: Shell) -> None:
    incoming: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"", "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Any:
        return incoming.pop(0)

    async def send(message: Any) -> None:
        raise AssertionError("nobody is there")

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/slow",
        "raw_path": b"/slow",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
    }
    await shell.edge(scope, receive, send)
    assert shell.cancelled.is_set()
    assert (
        'topwork_requests_total{method="POST",route="/slow",status="499"} 1.0'
        in shell.metrics.render().decode()
    )


@pytest.mark.anyio
async def test_a_sane_request_id_is_kept_and_any_other_replaced(shell: Shell) -> None:
    async with shell.client() as client:
        assert (await client.get("/things/1", headers={"x-request-id": "abc-1"})).headers[
            "x-request-id"
        ] == "abc-1"
        for bad in ("x" * 65, "a b", "a\tb"):
            given = (await client.get("/things/1", headers={"x-request-id": bad})).headers["x-request-id"]
            assert len(given) == 32


@pytest.mark.anyio
async def test_before_the_start_and_after_the_stop_it_is_503(shell: Shell) -> None:
    shell.edge.close()
    async with shell.client() as client:
        answer = await client.get("/things/1")
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
    assert answer.headers["retry-after"] == "1"


# Raised at the start, in a worker or in a command, or caught by the layer above, and never seen by a caller.
OF_NO_KIND = {
    "AlreadyAnswered",
    "BackupFailed",
    "BackupTooOld",
    "BadBackup",
    "DeviceLost",
    "DeviceUnavailable",
    "Diverged",
    "ExportFailed",
    "ExportRefused",
    "LeaseLost",
    "NoSuchResources",
    "RayMissing",
    "RayUnusable",
    "RegistryTooNew",
    "RegistryTooOld",
    "TargetInUse",
    "TrialFailed",
    "WrongStore",
}


def blank(cls: type[DomainError]) -> DomainError:
    """An error of the class without a message; one with several codes gets one."""
    error = cls.__new__(cls)
    if issubclass(cls, CodedError):
        error.code = "one_of_several"
    return error


def test_every_error_has_a_code_and_at_most_one_kind() -> None:
    """One without a kind is answered as a failure of the service, so the test knows them all."""
    kinds = {cls: [kind for kind in STATUSES if issubclass(cls, kind)] for cls in DOMAIN_ERRORS}
    assert {cls.__name__ for cls in DOMAIN_ERRORS if not kinds[cls]} == OF_NO_KIND
    assert all(len(found) <= 1 for found in kinds.values())
    for cls in DOMAIN_ERRORS:
        assert hasattr(cls, "code") != issubclass(cls, CodedError), cls
        assert respond(blank(cls), "r").status_code == (STATUSES[kinds[cls][0]] if kinds[cls] else 500)


def test_every_exception_with_a_code_is_a_domain_error() -> None:
    for module in {name: module for name, module in sys.modules.items() if name.startswith(_LAYERS)}.values():
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Exception) and hasattr(value, "code"):
                assert issubclass(value, DomainError) or not value.__module__.startswith(_LAYERS), value


_LAYERS = ("models.", "adapters.")


@pytest.mark.parametrize("cls", DOMAIN_ERRORS)
def test_statuses_that_mean_later_say_when(cls: type[DomainError]) -> None:
    response = respond(blank(cls), "r")
    later = response.status_code in (429, 503) or cls is TenantErased
    assert ("retry-after" in response.headers) == later


INSIDE = (
    "no such file: '/srv/topwork/artifacts/acme/0a/head.safetensors'",
    "/home/me/.topwork/topwork.db is locked",
    "(sqlite3.OperationalError) no such table: heads\n[SQL: SELECT heads.name FROM heads]",
    "duplicate key: INSERT INTO tenants (name) VALUES ('acme')",
    'Traceback (most recent call last):\n  File "/usr/lib/python3.11/json/decoder.py", line 355, in raw',
    "connection to postgresql+psycopg://topwork:secret@database:5432/topwork failed",
)
UNFORESEEN = (RuntimeError, KeyError, OSError, UnicodeDecodeError, AssertionError, MemoryError, DBAPIError)


@pytest.mark.parametrize("cls", [*DOMAIN_ERRORS, *UNFORESEEN])
@pytest.mark.parametrize("message", INSIDE)
def test_no_refusal_tells_of_the_inside(cls: type[Exception], message: str) -> None:
    for where in ("args", "detail", "errors"):
        if issubclass(cls, DomainError):
            error: Exception = blank(cls)
        else:
            error = cls("", (), Exception()) if issubclass(cls, DBAPIError) else cls.__new__(cls)
        if where == "errors":
            error.errors = [{"pointer": "/a", "code": "b", "detail": message}]  # type: ignore[attr-defined]
        elif where == "detail" and not issubclass(cls, DBAPIError | DomainError):
            error.detail = message  # type: ignore[attr-defined]
        if cls not in (UnicodeDecodeError, DBAPIError):
            error.args = ("Fine.",) if where == "errors" else (message,)
        response = respond(error, "the-id")
        body = json.loads(bytes(response.body))
        assert response.status_code == body["status"]
        assert "the-id" in body["detail"]
        assert "errors" not in body
        for word in ("topwork.db", "artifacts", "SELECT", "INSERT", "Traceback", "python3.11", "secret"):
            assert word not in body["detail"]


def test_what_a_caller_may_know_is_told() -> None:
    answered = [cls for cls in DOMAIN_ERRORS if issubclass(cls, tuple(STATUSES))]
    ours = {"Problem", *(cls.__name__ for cls in answered if not issubclass(cls, InternalFailure))}
    for path in (path for layer in ("service", "adapters", "models") for path in Path(layer).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            if ast.unparse(node.exc.func) in ours:
                texts = [one.value for one in node.exc.args if isinstance(one, ast.Constant)]
                assert not any(leaks_internals(text) for text in texts if isinstance(text, str)), path
    found = respond(UnknownAdapter("pets"), "r")
    assert json.loads(bytes(found.body))["detail"] == str(UnknownAdapter("pets"))


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (QueueFull(0.2), 429, "rate_limit_error", "overloaded"),
        (UnknownAdapter("pets"), 404, "invalid_request_error", "unknown_adapter"),
        (Problem(401, "unauthorized", "Send the key."), 401, "invalid_request_error", "unauthorized"),
        (Problem(503, "not_ready", "Wait."), 503, "server_error", "not_ready"),
        (ZeroDivisionError("a secret"), 500, "server_error", "internal_error"),
    ],
)
def test_any_error_has_openai_s_form(error: Exception, status: int, kind: str, code: str) -> None:
    response = respond(error, "r", openai=True)
    body = json.loads(bytes(response.body))
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert (response.status_code, body["error"]["type"], body["error"]["code"]) == (status, kind, code)
    assert response.headers["content-type"] == "application/json"
    assert ("retry-after" in response.headers) == (status == 429)
    assert "secret" not in body["error"]["message"]


@pytest.mark.anyio
async def test_the_edge_s_own_refusals_below_v1_have_openai_s_form(tmp_path: Path) -> None:
    key = SecretStr("0123456789abcdef")
    shell = Shell(Settings(home=tmp_path, admin_key=key, max_body_bytes=10, access_log=False), ["0.0.0.0"])
    async with shell.client() as client:
        asked = {"unauthorized": await client.post("/v1/embeddings")}
        known = {"Authorization": f"Bearer {key.get_secret_value()}"}
        asked["not_found"] = await client.get("/v1/nothing", headers=known)
        asked["body_too_large"] = await client.post("/v1/embeddings", content=b"x" * 11, headers=known)
        # A HEAD is refused without a body.
        head = await client.head("/v1/models")
        assert (head.status_code, head.content) == (401, b"")
        shell.edge.close()
        asked["not_ready"] = await client.get("/v1/models", headers=known)
    for code, answer in asked.items():
        assert answer.json()["error"]["code"] == code
        assert "x-request-id" in answer.headers or code == "not_ready"


def test_a_retry_after_is_whole_seconds_and_at_least_one() -> None:
    assert respond(QueueFull(0.2), "r").headers["retry-after"] == "1"
    assert respond(QueueFull(2.4), "r").headers["retry-after"] == "3"


def test_a_pointer_is_escaped() -> None:
    assert pointer(("body", "examples", 3, "a/b~c")) == "/examples/3/a~1b~0c"
    assert pointer(("query", "limit")) == "/query/limit"


def test_any_text_can_be_a_detail() -> None:
    """A lone surrogate comes in through JSON and has no UTF-8."""
    assert b"\\ud800" in bytes(respond(Problem(422, "bad", "label '\ud800'"), "r").body)


def test_a_problem_s_headers_and_errors_reach_the_caller() -> None:
    problem = Problem(
        429, "busy", "Wait.", errors=[{"pointer": "/a", "code": "b", "detail": "c"}], headers={"X": "y"}
    )
    response = respond(problem, "r")
    assert response.headers["x"] == "y"
    assert b'"pointer": "/a"' in bytes(response.body)


def test_only_the_edge_knows_statuses() -> None:
    """No module outside service/ imports a web framework, so no status can hide there."""
    for package in ("models", "adapters"):
        for path in Path(package).rglob("*.py"):
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom | ast.Import):
                    names = (
                        [node.module or ""]
                        if isinstance(node, ast.ImportFrom)
                        else [a.name for a in node.names]
                    )
                    assert not {name.split(".")[0] for name in names} & {"fastapi", "starlette", "uvicorn"}, (
                        path
                    )


def test_ids_of_requests_tell_nothing_of_each_other() -> None:
    """Nothing grows in them, nothing stays, and each bit is set in half of them."""
    ids = [new_id() for _ in range(4_096)]
    assert len(set(ids)) == len(ids)
    assert {len(one) for one in ids} == {32}
    numbers = [int(one, 16) for one in ids]
    # Seven standard deviations of 32 are 224.
    for bit in range(128):
        assert abs(sum(number >> bit & 1 for number in numbers) - 2_048) < 224, bit
        same = sum((one ^ other) >> bit & 1 for one, other in pairwise(numbers))
        assert abs(same - 2_048) < 224, bit
