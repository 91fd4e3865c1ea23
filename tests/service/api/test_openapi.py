"""The API's document: complete, and true of what is answered."""

from __future__ import annotations

from typing import Any

import pytest

from service.payloads.responses.adaptation import AdaptResponse, RemovalResponse, RestoreResponse
from service.payloads.responses.adapters import AdapterOut, AdaptersOut, VersionOut, VersionsOut
from service.payloads.responses.answer import ProblemOut
from service.payloads.responses.backbones import BackbonesOut
from service.payloads.responses.examples import ExampleOut, ExamplesPage
from service.payloads.responses.jobs import JobsOut
from service.payloads.responses.openai import OpenAIResponse
from service.payloads.responses.predictions import EmbedResponse, PredictResponse
from tests.support.service.client import UNSEEN, Caller, image, pictures, reviews
from tests.support.service.document import ROUTES, exactly


@pytest.fixture
def document(caller: Caller) -> Any:
    """The OpenAPI document of the running service."""
    return caller.call("GET", "/openapi.json")


def test_every_route_is_there(document: Any) -> None:
    methods = ("get", "put", "post", "patch", "delete")
    assert {
        (method, path) for path, found in document["paths"].items() for method in found if method in methods
    } == ROUTES


def test_every_reference_leads_somewhere(document: Any) -> None:
    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [found for item in value.values() for found in references(item)]
        return [found for item in value for found in references(item)] if isinstance(value, list) else []

    found = references(document)
    assert len(found) > 30
    for reference in found:
        place = document
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]


def test_every_route_says_what_it_does_and_takes(document: Any) -> None:
    for path, operations in document["paths"].items():
        named = any(one["name"] == "X-Tenant" for one in operations.get("parameters", ()))
        assert named != path.startswith("/tenants")
        for method in ("get", "put", "post", "patch", "delete"):
            if method in operations:
                assert operations[method]["description"], path
                bodyless = path.endswith(("/cancel", "/restore"))
                if method in ("post", "put", "patch") and not bodyless:
                    assert "application/json" in operations[method]["requestBody"]["content"]


def test_examples_of_the_document_are_accepted(caller: Caller, document: Any) -> None:
    found = document["components"]["schemas"]
    caller.call("POST", "/adapt", json=found["AdaptRequest"]["example"])
    caller.call("POST", "/predict", json=found["PredictRequest"]["example"])
    caller.call("POST", "/embed", json=found["EmbedRequest"]["example"])
    caller.call("POST", "/v1/embeddings", json=found["OpenAIRequest"]["example"])
    caller.call("POST", "/adapters/mails/feedback", json=found["FeedbackRequest"]["example"])
    body = {"fit": False, **found["AmendRequest"]["example"]}
    caller.call("PATCH", "/adapters/mails/examples/m1", json=body)


def test_answers_have_the_documented_form(caller: Caller) -> None:
    exactly(AdaptResponse, caller.adapt("films", [*reviews(), {"text": "no label"}]))
    exactly(AdaptResponse, caller.adapt("things", pictures(), fit=False))
    exactly(AdaptResponse, caller.adapt("things", []))
    inputs = [image(UNSEEN["cow"]), {"text": "x"}]
    exactly(PredictResponse, caller.predict("things", inputs, explain=2))
    exactly(
        EmbedResponse,
        caller.call("POST", "/embed", json={"backbone": "minilm-l6-v2", "inputs": inputs}),
    )
    body = {"model": "minilm-l6-v2", "input": "x"}
    exactly(OpenAIResponse, caller.call("POST", "/v1/embeddings", json=body))
    exactly(BackbonesOut, caller.call("GET", "/backbones"))
    exactly(AdaptersOut, caller.call("GET", "/adapters"))
    exactly(AdapterOut, caller.call("GET", "/adapters/films"))
    exactly(VersionsOut, caller.call("GET", "/adapters/films/versions"))
    exactly(VersionOut, caller.call("GET", "/adapters/films/versions/1"))
    exactly(ExamplesPage, caller.call("GET", "/adapters/films/examples"))
    exactly(ExampleOut, caller.call("GET", "/adapters/films/examples/good1"))
    amended = caller.call("PATCH", "/adapters/films/examples/good1", json={"excluded": True})
    exactly(AdaptResponse, amended)
    restored = caller.call("POST", "/adapters/films/versions/1/restore")
    exactly(RestoreResponse, restored)
    exactly(RemovalResponse, caller.call("DELETE", "/adapters/films/examples/good1"))
    exactly(AdapterOut, caller.call("PUT", "/adapters/films/aliases/live", json={"version": 3}))
    exactly(JobsOut, caller.call("GET", "/jobs"))
    exactly(ProblemOut, caller.call("GET", "/adapters/none", 404))
    exactly(ProblemOut, caller.call("POST", "/adapt", 422, json={}))


def test_routes_stay_short() -> None:
    """A route validates, calls and shapes; what is longer belongs elsewhere."""
    import ast
    import inspect

    from service.api import app

    tree = ast.parse(inspect.getsource(app))
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef):
            first, last = node.body[0].lineno, node.body[-1].end_lineno or 0
            assert last - first < 10, node.name
            assert not any(isinstance(inner, ast.Try | ast.For | ast.While) for inner in ast.walk(node)), (
                node.name
            )
