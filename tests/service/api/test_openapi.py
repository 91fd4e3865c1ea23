"""The API's document: complete, and true of what is answered."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from service.payloads.responses.adaptation import AdaptResponse, RemovalResponse, RestoreResponse
from service.payloads.responses.adapters import AdapterDetailOut, AdaptersOut, VersionOut, VersionsOut
from service.payloads.responses.answer import ProblemOut
from service.payloads.responses.backbones import BackbonesOut
from service.payloads.responses.examples import ExampleOut, ExamplesPage
from service.payloads.responses.jobs import JobsOut
from service.payloads.responses.openai import OpenAIResponse
from service.payloads.responses.predictions import EmbedResponse, PredictResponse
from tests.support.service.client import UNSEEN, Caller, image, pictures, reviews
from tests.support.service.document import ROUTES, exactly

METHODS = ("get", "put", "post", "patch", "delete")


@pytest.fixture
def document(caller: Caller) -> Any:
    """The OpenAPI document of the running service."""
    return caller.call("GET", "/openapi.json")


def test_every_route_is_there(document: Any) -> None:
    assert {
        (method, path) for path, found in document["paths"].items() for method in found if method in METHODS
    } == ROUTES


def test_the_document_is_valid_openapi(document: Any) -> None:
    """`make lint-openapi` looks at it with Redocly as well, which needs Node."""
    assert not [error.message for error in OpenAPIV31SpecValidator(document).iter_errors()]
    assert document["info"]["license"]["identifier"] == "Apache-2.0"
    assert document["servers"]


def test_operations_are_named_and_grouped(document: Any) -> None:
    every = [found[method] for found in document["paths"].values() for method in METHODS if method in found]
    names = [one["operationId"] for one in every]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", name) for name in names)
    headings = [tag["name"] for tag in document["tags"]]
    assert {tag for one in every for tag in one["tags"]} == set(headings)
    assert all(len(one["tags"]) == 1 and one["summary"] for one in every)


def test_every_refusal_has_a_form_and_says_why(document: Any) -> None:
    for path, operations in document["paths"].items():
        for method in set(METHODS) & operations.keys():
            for status, response in operations[method]["responses"].items():
                if int(status) < 400:
                    continue
                form = "OpenAIProblem" if path.startswith("/v1/") else "ProblemOut"
                assert form in json.dumps(response["content"])
                assert response["description"].endswith(".")
                assert ("headers" in response) == (status in ("429", "503"))


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
        for method in METHODS:
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
    exactly(AdapterDetailOut, caller.call("GET", "/adapters/films"))
    exactly(VersionsOut, caller.call("GET", "/adapters/films/versions"))
    exactly(VersionOut, caller.call("GET", "/adapters/films/versions/1"))
    exactly(ExamplesPage, caller.call("GET", "/adapters/films/examples"))
    exactly(ExampleOut, caller.call("GET", "/adapters/films/examples/good1"))
    amended = caller.call("PATCH", "/adapters/films/examples/good1", json={"excluded": True})
    exactly(AdaptResponse, amended)
    restored = caller.call("POST", "/adapters/films/versions/1/restore")
    exactly(RestoreResponse, restored)
    exactly(RemovalResponse, caller.call("DELETE", "/adapters/films/examples/good1"))
    exactly(AdapterDetailOut, caller.call("PUT", "/adapters/films/aliases/live", json={"version": 3}))
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
