"""Names of labels and costs of labels, over HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.service.client import BLAME, PRAISE, UNSEEN, Caller, image, pictures
from tests.support.service.uploads import NDJSON, upload

MEANINGS = {
    "refund": "a customer wants money back",
    "delivery": "a question about when a parcel arrives",
    "login_trouble": None,
}
ASKED = [
    {"text": "I want my money back for this broken kettle"},
    {"text": "Where is my parcel? It should have come on Monday"},
]
MAILS = [
    {"text": "Please give me my money back", "label": "refund"},
    {"text": "The parcel has not arrived", "label": "delivery"},
    {"text": "I was charged twice and want a refund", "label": "refund"},
    {"text": "When will you deliver my order?", "label": "delivery"},
]


def shown(caller: Caller, adapter: str = "mails") -> Any:
    return caller.call("GET", f"/adapters/{adapter}")["labels"]


def best(answer: Any) -> list[str]:
    """The likeliest label of each input, abstained on or not."""
    return [one["probabilities"][0]["label"] for one in answer["predictions"]]


def test_labels_are_kept_until_others_are_given(caller: Caller) -> None:
    caller.adapt("mails", MAILS)
    assert shown(caller) == {}
    made = caller.adapt("mails", [], labels=MEANINGS)
    assert made["version"] == 2
    assert shown(caller) == dict(sorted(MEANINGS.items()))
    revision = caller.call("GET", "/adapters/mails")["revision"]
    caller.adapt("mails", [{"text": "Refund me", "label": "refund"}])
    caller.adapt("mails", MAILS, update="replace")
    assert shown(caller) == dict(sorted(MEANINGS.items()))
    caller.adapt("mails", [], labels=["refund", "delivery"], fit=False)
    assert shown(caller) == {"delivery": None, "refund": None}
    assert caller.call("GET", "/adapters/mails")["revision"] > revision
    caller.adapt("mails", [], labels={"refund": "money back"})
    assert shown(caller) == {"refund": "money back"}
    caller.adapt("mails", [], labels={})
    assert shown(caller) == {}
    # A page may hold many adapters, so it leaves them out.
    assert "labels" not in caller.call("GET", "/adapters")["adapters"][0]


def test_a_name_is_as_good_as_an_example_of_its_spelling(caller: Caller) -> None:
    caller.adapt("mails", MAILS, labels={"re-fund": None, "café": None})
    assert list(shown(caller)) == ["café", "re-fund"]
    found = caller.adapt("mails", [{"text": "A table by the window", "label": "cafe\u0301"}])
    assert found["examples"]["rejected"] == []
    found = caller.adapt("mails", [{"text": "x", "label": "re\u00adfund"}], 422)
    assert found["errors"][0]["code"] == "label_invalid" or found["errors"][0]["code"] == "label_collision"
    found = caller.adapt("mails", [], 422, labels=["ｒefund"])
    assert found["code"] == "label_collision"
    assert "refund" in found["detail"]


@pytest.mark.parametrize(
    ("labels", "code", "pointer"),
    [
        ({"refund": ""}, "invalid_request", "/labels/refund"),
        ({"refund": "x" * 1_001}, "invalid_request", "/labels/refund"),
        ({"refund": 5}, "invalid_request", "/labels/refund"),
        ({"a/b~": "   "}, "description_invalid", "/labels/a~1b~0"),
        ({"refund": "a\0b"}, "description_invalid", "/labels/refund"),
        ({"": "what it means"}, "label_missing", "/labels/"),
        ({"re\nfund": None}, "label_invalid", "/labels/re\nfund"),
        ({"x" * 300: None}, "label_too_long", "/labels/" + "x" * 300),
        ({" refund": None, "refund": None}, "label_collision", "/labels/refund"),
        (["refund", "refund"], "label_collision", "/labels/1"),
        (["refund", ""], "label_missing", "/labels/1"),
        (["refund", 5], "invalid_request", "/labels/1"),
        ({f"label {row}": "x" * 1_000 for row in range(60)}, "labels_too_long", "/labels"),
        ("refund", "invalid_request", "/labels"),
    ],
)
def test_what_cannot_be_a_name(caller: Caller, labels: Any, code: str, pointer: str) -> None:
    found = caller.adapt("mails", MAILS, 422, labels=labels)
    assert found["code"] == code
    assert [one["pointer"] for one in found["errors"]] == [pointer]
    assert caller.call("GET", "/adapters")["adapters"] == []


def test_half_of_a_surrogate_pair_is_no_text(caller: Caller) -> None:
    for labels in ('{"refund": "\\ud83d"}', '{"\\ud83d": null}', '["\\ud83d"]'):
        body = f'{{"adapter": "mails", "labels": {labels}}}'.encode()
        headers = {"Content-Type": "application/json"}
        assert caller.code("POST", "/adapt", 400, content=body, headers=headers) == "invalid_json"


def test_names_are_for_classifications_in_json(caller: Caller) -> None:
    numbers = [{"text": text, "target": float(row)} for row, text in enumerate(PRAISE)]
    assert caller.adapt("stars", numbers, 422, task="regression", labels=["a", "b"])["code"] == (
        "labels_not_for_task"
    )
    tagged = [{"text": text, "labels": ["a"]} for text in (*PRAISE, *BLAME)]
    assert caller.adapt("tags", tagged, 422, task="multilabel", labels=["a"])["code"] == "labels_not_for_task"
    assert caller.adapt("stars", numbers, 422, task="regression", weights={"a": 2})["code"] == (
        "weights_not_for_task"
    )
    files = {"x": ("good/1.txt", "Splendid", "text/plain")}
    for fields in ({"labels": '{"a": null}'}, {"weights": '{"a": 2}'}):
        found = caller.call("POST", "/adapt", 422, data={"adapter": "films", **fields}, files=files)
        assert found["code"] == "invalid_request"
    for query in ("labels=a", "weights=%7B%22a%22%3A2%7D"):
        upload = {"content": b"{}", "headers": {"Content-Type": "application/x-ndjson"}}
        assert caller.code("POST", f"/adapt?adapter=films&{query}", 422, **upload) == "invalid_request"


def test_more_labels_than_a_request_may_have(caller: Caller) -> None:
    many = [f"label {row}" for row in range(2_001)]
    for field, value in (
        ("labels", many),
        ("labels", dict.fromkeys(many)),
        ("weights", dict.fromkeys(many, 2)),
    ):
        found = caller.adapt("films", [], 413, **{field: value})
        assert found["code"] == "too_many_items"


def test_costs_are_the_adapters_until_others_are_given(caller: Caller) -> None:
    caller.adapt("mails", MAILS, weights={"refund": 10})
    assert caller.call("GET", "/adapters/mails")["weights"] == {"refund": 10.0}
    caller.adapt("mails", [{"text": "Refund me", "label": "refund"}])
    assert caller.call("GET", "/adapters")["adapters"][0]["weights"] == {"refund": 10.0}
    caller.adapt("mails", [], weights="balanced")
    assert caller.call("GET", "/adapters/mails")["weights"] == "balanced"
    # A label may have a name and no example.
    caller.adapt("mails", [], weights={"login": 0.5}, labels={"login": None})
    assert caller.call("GET", "/adapters/mails")["weights"] == {"login": 0.5}
    # It may also go: the cost waits for it.
    caller.adapt("mails", [], labels={})
    caller.adapt("mails", [], weights="none")
    assert caller.call("GET", "/adapters/mails")["weights"] == "none"


def test_what_cannot_be_a_cost(caller: Caller) -> None:
    found = caller.adapt("mails", MAILS, 422, weights={"refund": 2, "fraud": 10})
    assert found["code"] == "weights_label_unknown"
    assert "'fraud'" in found["detail"]
    for cost in (0, -1, 1_001, "2", True, None):
        found = caller.adapt("mails", MAILS, 422, weights={"refund": cost})
        assert (found["code"], found["errors"][0]["pointer"]) == ("invalid_request", "/weights/refund")
    assert caller.call("GET", "/adapters")["adapters"] == []


def test_a_name_of_no_known_word_is_said(caller: Caller) -> None:
    found = caller.adapt("mails", MAILS, labels={"refund": "สวัสดี", "delivery": "where a parcel is"})
    warnings = {one["code"]: one["detail"] for one in found["report"]["warnings"]}
    assert "refund" in warnings["label_name_unknown"]


def test_names_of_images_are_compared_with_what_the_network_knows(caller: Caller) -> None:
    meanings = {"vehicle": "a car, a truck or a train", "animal": None, "food": "something to eat"}
    found = caller.adapt("things", pictures(), labels=meanings)
    assert found["version"] == 1
    assert not [one for one in found["report"]["warnings"] if one["code"] == "labels_not_readable"]
    assert shown(caller, "things") == dict(sorted(meanings.items()))


def test_a_fine_tune_needs_examples_of_every_label(caller: Caller) -> None:
    caller.adapt("mails", MAILS)
    found = caller.adapt("mails", [], 422, method="fine_tune", labels=MEANINGS)
    assert found["code"] == "too_few_examples"
    found = caller.adapt("mails", [], 422, method="fine_tune", labels=["ｒefund"])
    assert found["code"] in ("too_few_examples", "label_collision")
    assert shown(caller) == {}


def test_names_alone_make_the_first_version(caller: Caller) -> None:
    found = caller.adapt("mails", [], labels=MEANINGS)
    assert (found["version"], found["live"], found["backbone"]) == (1, True, "minilm-l6-v2")
    assert found["examples"]["total"] == 0
    answer = caller.predict("mails", ASKED, top_k=3)
    assert best(answer) == ["refund", "delivery"]
    first = answer["predictions"][0]["probabilities"]
    assert {one["label"] for one in first} == MEANINGS.keys()
    # The first examples are learned beside the names.
    found = caller.adapt("mails", MAILS[:1])
    assert (found["version"], found["live"]) == (2, True)
    assert caller.predict("mails", ASKED, explain=2)["version"] == 2


def test_names_of_images_alone_make_the_first_version(caller: Caller) -> None:
    labels = {"ambulance": None, "cow": None, "strawberry": None}
    found = caller.adapt("things", [], labels=labels, backbone="efficientnet-lite0")
    assert found["version"] == 1
    answer = caller.predict("things", [image(UNSEEN[label]) for label in labels], top_k=1)
    assert best(answer) == list(labels)


def test_what_is_left_of_an_adapter_without_examples_are_its_names(caller: Caller) -> None:
    caller.adapt("mails", MAILS, labels=MEANINGS)
    gone = caller.call("DELETE", "/adapters/mails/examples?all=true")
    assert (gone["version"], gone["live"]) == (2, True)
    assert caller.predict("mails", ASKED)["version"] == 2


def test_one_label_with_examples_and_another_with_a_name_alone_are_two(caller: Caller) -> None:
    found = caller.adapt("mails", MAILS[:1], labels={"refund": None, "delivery": None})
    assert (found["version"], found["live"]) == (1, True)
    assert best(caller.predict("mails", ASKED)) == ["refund", "delivery"]


def test_too_few_names_and_no_examples_are_nothing_to_fit(caller: Caller) -> None:
    assert caller.adapt("mails", [], 422, labels=["refund"])["code"] == "nothing_to_fit"
    found = caller.adapt("mails", [], 422, labels={"a": "สวัสดี", "b": "ขอบคุณ"})
    assert found["code"] == "nothing_to_fit"
    assert "knows no word" in found["detail"]
    assert caller.adapt("mails", [], 404, labels={})["code"] == "unknown_adapter"
    assert caller.call("GET", "/adapters")["adapters"] == []
    stored = caller.adapt("mails", [], labels=["refund"], fit=False)
    assert stored["version"] is None
    assert shown(caller) == {"refund": None}


def test_an_upload_of_images_is_learned_beside_names(caller: Caller) -> None:
    labels = {"animal": "an animal", "food": None, "vehicle": None, "building": None}
    caller.adapt("things", [], labels=labels, backbone="efficientnet-lite0")
    content = "\n".join(map(json.dumps, pictures())).encode()
    done = upload(caller, "adapter=things", content, NDJSON)
    assert done["state"] == "succeeded"
    version = caller.call("GET", f"/adapters/things/versions/{done['version']}")
    assert version["labels"] == 4
    assert "labels_not_readable" not in [one["code"] for one in version["report"]["warnings"]]
    assert shown(caller, "things") == labels | {"food": None}


def test_an_erased_adapter_leaves_no_description(caller: Caller) -> None:
    caller.adapt("mails", MAILS, labels=MEANINGS)
    caller.call("DELETE", "/adapters/mails")
    caller.adapt("mails", MAILS)
    assert shown(caller) == {}
