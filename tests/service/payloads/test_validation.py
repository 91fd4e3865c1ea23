"""Pointers of validation errors lead to a place in the request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from adapters.finetune.config import FineTuneConfig
from service.api.openapi import _REQUESTS
from service.errors import Problem
from service.payloads import requests, tenants
from service.payloads.validation import apart, lax, strict

WRONG: list[Any] = [5, 1.5, True, "x" * 3_000, [], {}, [5], [[5]], [None], {"str": 1}, [{"list[str]": [2]}]]
EXAMPLE = {"text": "a", "label": "b", "id": "c", "group": "d", "sampled": True}
VALID: dict[type[BaseModel], dict[str, Any]] = {
    requests.AdaptRequest: {
        "adapter": "films",
        "method": "fine_tune",
        "fine_tune": {"epochs": 3},
        "labels": {"a": "what it means", "b": None},
        "weights": {"a": 2.5},
        "examples": [EXAMPLE, {**EXAMPLE, "labels": ["a", "b"]}],
    },
    requests.PredictRequest: {
        "adapter": "films",
        "version": 1,
        "inputs": [{"text": "a"}, "b", {"image": "c"}],
    },
    requests.EmbedRequest: {"backbone": "minilm-l6-v2", "inputs": ["a", {"text": "b"}]},
    requests.OpenAIRequest: {"model": "minilm-l6-v2", "input": ["a", "b"], "dimensions": 384, "user": "u"},
    requests.PromoteRequest: {"version": 1},
    requests.FeedbackRequest: EXAMPLE,
    requests.AmendRequest: {
        "label": "spam",
        "excluded": True,
        "group": "a",
        "promote": "never",
        "fit": False,
    },
    requests.RebaseRequest: {"backbone": "minilm-l6-v2", "promote": "never"},
    tenants.TenantRequest: {"tenant": "acme"},
    tenants.QuotasIn: {"requests_per_second": 1.0, "max_adapters": 3},
    tenants.KeyRequest: {"scopes": ["predict"], "note": "n", "expires_in": 60},
    tenants.RotateRequest: {"grace": 5},
}
ITEMS: dict[type[BaseModel], tuple[str, type[BaseModel]]] = {
    requests.AdaptRequest: ("examples", requests.ExampleIn),
    requests.PredictRequest: ("inputs", requests.InputIn),
    requests.EmbedRequest: ("inputs", requests.InputIn),
}


def changed(value: Any) -> Iterator[Any]:
    """The value with each part of it, in turn, left out, renamed, or of another type."""
    yield from WRONG
    if isinstance(value, dict):
        for name, one in value.items():
            rest = {other: held for other, held in value.items() if other != name}
            yield rest
            yield {**rest, name + "~/x": one}
            yield from ({**value, name: other} for other in changed(one))
    if isinstance(value, list):
        for place, one in enumerate(value):
            yield from ([*value[:place], other, *value[place + 1 :]] for other in changed(one))


def lookup(document: Any, pointer: str) -> Any:
    """The value at a JSON pointer (RFC 6901). Raises KeyError, IndexError or ValueError."""
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        document = document[int(name)] if isinstance(document, list) else document[name]
    return document


def told(model: type[BaseModel], body: Any) -> list[tuple[str, str]]:
    """Pointer and detail of all that is wrong with the body."""
    try:
        if model not in ITEMS:
            strict(model, body)
            return []
        items, item = ITEMS[model]
        _, faults = apart(model, body, items, item)
        places = {index: f"/{items}/{index}" for index in faults}
        return [
            (f"{places[index]}/{one.place}" if one.place else places[index], one.detail)
            for index, one in faults.items()
        ]
    except Problem as problem:
        return [(one["pointer"], one["detail"]) for one in problem.errors] or [("/nothing", "is told")]


def test_every_model_is_tried() -> None:
    assert VALID.keys() == set(_REQUESTS)
    for model, value in VALID.items():
        strict(model, value)


@pytest.mark.parametrize("model", VALID, ids=lambda model: model.__name__)
def test_pointers_lead_to_what_is_in_the_request(model: type[BaseModel]) -> None:
    refused = 0
    for body in changed(VALID[model]):
        for place, detail in told(model, body):
            lookup(body, place)
            assert 0 < len(detail) < 400
            refused += 1
    assert refused > len(WRONG)


@pytest.mark.parametrize("model", VALID, ids=lambda model: model.__name__)
def test_null_is_as_good_as_leaving_a_field_out(model: type[BaseModel]) -> None:
    required = {name: VALID[model][name] for name, field in model.model_fields.items() if field.is_required()}
    nulls = {name: None for name in model.model_fields if name not in required}
    assert strict(model, {**required, **nulls}) == strict(model, required)
    for name in required:
        with pytest.raises(Problem) as caught:
            strict(model, {**required, name: None})
        assert [one["pointer"] for one in caught.value.errors] == [f"/{name}"]


def test_null_inside_of_what_is_nested_is_as_good_as_leaving_it_out() -> None:
    tune = dict.fromkeys(field.name for field in fields(FineTuneConfig))
    example = {**dict.fromkeys(requests.ExampleIn.model_fields), "text": "a", "label": "b"}
    body = {"adapter": "films", "fine_tune": tune, "examples": [example]}
    plain = {"adapter": "films", "fine_tune": {}, "examples": [{"text": "a", "label": "b"}]}
    assert strict(requests.AdaptRequest, body) == strict(requests.AdaptRequest, plain)
    with pytest.raises(Problem) as caught:
        strict(requests.AdaptRequest, {"adapter": "films", "nothing": None})
    assert [one["code"] for one in caught.value.errors] == ["unknown_field"]


def test_what_is_wrong_with_one_example_is_told_of_it_alone() -> None:
    wrong: dict[str, tuple[Any, str, str]] = {
        "label": (3, "label_invalid", "label"),
        "labels": (["a", 3], "label_invalid", "labels/1"),
        "target": ("1", "target_invalid", "target"),
        "id": (7, "id_invalid", "id"),
        "group": (7, "group_invalid", "group"),
        "sampled": ("no", "sampled_invalid", "sampled"),
        "text": (5, "invalid_text", "text"),
        "image": (5, "invalid_base64", "image"),
        "lable": ("x", "unknown_field", "lable"),
    }
    examples = (
        [{"text": "fine", "label": "a"}] + [{name: value} for name, (value, _, _) in wrong.items()] + [5]
    )
    posted = {"adapter": "x", "examples": examples}
    body, faults = apart(requests.AdaptRequest, posted, "examples", requests.ExampleIn)
    assert [one.text for one in body.examples] == ["fine"]
    told = {index: (one.code, one.place) for index, one in faults.items()}
    expected = {index: (code, place) for index, (_, code, place) in enumerate(wrong.values(), 1)}
    assert told == {**expected, len(examples) - 1: ("not_an_object", "")}
    assert "Did you mean `label`?" in faults[9].detail
    assert faults[1].detail == '`label` is a number; send a string, such as "3".'


def test_a_field_that_inputs_do_not_have_is_not_suggested() -> None:
    asked = {"adapter": "x", "inputs": [{"text": "a", "label": "b"}, {"txt": "a"}]}
    _, faults = apart(requests.PredictRequest, asked, "inputs", requests.InputIn)
    assert [faults[index].detail for index in (0, 1)] == [
        "There is no field `label`.",
        "There is no field `txt`. Did you mean `text`?",
    ]


MANY = dict.fromkeys(map(str, range(1_000)), 1)


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (requests.PredictRequest, {"adapter": "films", **MANY}),
        (requests.PredictRequest, {"adapter": "films", "inputs": [MANY]}),
        (requests.AdaptRequest, {"adapter": "films", "fine_tune": MANY}),
        (requests.AdaptRequest, {"adapter": "films", "examples": [{"labels": list(range(1_000))}]}),
        (requests.AdaptRequest, {"adapter": "films", "labels": MANY}),
        (requests.AdaptRequest, {"adapter": "films", "labels": list(range(1_000))}),
        (requests.AdaptRequest, {"adapter": "films", "weights": dict.fromkeys(MANY, "x")}),
        (requests.OpenAIRequest, {"model": "minilm-l6-v2", "input": list(range(1_000))}),
    ],
    ids=[
        "fields",
        "fields of an item",
        "fields of a fine-tune",
        "labels",
        "descriptions",
        "names",
        "costs",
        "token ids",
    ],
)
def test_errors_are_few_whatever_the_request_has(model: type[BaseModel], body: Any) -> None:
    """pydantic holds the GIL while it makes them: of a million, for seconds."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert 0 < caught.value.error_count() <= 20
    assert told(model, body)


def test_a_parameter_s_pointer_says_whether_it_is_of_the_query_or_of_the_form() -> None:
    with pytest.raises(Problem) as caught:
        lax(requests.PredictRequest, {"adapter": "a", "colour": "red"}, {"top_k": "many"})
    assert {one["pointer"]: one["code"] for one in caught.value.errors} == {
        "/query/colour": "unknown_parameter",
        "/fields/top_k": "int_parsing",
    }
    with pytest.raises(Problem) as caught:
        lax(requests.PredictRequest, {}, {})
    assert [one["pointer"] for one in caught.value.errors] == ["/query"]
