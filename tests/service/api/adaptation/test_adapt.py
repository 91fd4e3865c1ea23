"""POST /adapt: examples in, new version out, over HTTP."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.support.service.client import (
    BLAME,
    JSON,
    PICTURES,
    PRAISE,
    UNSEEN,
    Caller,
    image,
    pictures,
    reviews,
    same,
)


def test_a_few_texts_are_enough(caller: Caller) -> None:
    found = caller.adapt("films", reviews())
    assert (found["adapter"], found["version"], found["live"]) == ("films", 1, True)
    assert found["backbone"] == "minilm-l6-v2"
    assert found["examples"] == {"total": 12, "added": 12, "replaced": 0, "removed": 0, "rejected": []}
    report = found["report"]
    assert report["method"].endswith("-fold out-of-fold")
    low, high = report["accuracy_interval"]
    assert 0 <= low <= report["accuracy"] <= high <= 1
    assert set(report["per_label"]) == {"good", "bad"}
    assert report["promotion"]["promoted"]
    assert {"tokenize", "embed", "fit", "publish", "total"} <= found["timing_ms"].keys()
    answer = caller.predict("films", [{"text": "Wonderful, I loved it"}, {"text": "Awful and boring"}])
    assert [one["label"] for one in answer["predictions"]] == ["good", "bad"]
    assert answer["version"] == 1


def test_a_few_images_are_enough(caller: Caller) -> None:
    found = caller.adapt("things", pictures())
    assert found["backbone"] == "efficientnet-lite0"
    assert {"decode", "embed", "fit", "publish"} <= found["timing_ms"].keys()
    answer = caller.predict("things", [image(data) for data in UNSEEN.values()])
    labels = dict(zip(UNSEEN, (one["label"] for one in answer["predictions"]), strict=True))
    assert labels == {"ambulance": "vehicle", "cow": "animal", "strawberry": "food"}


def test_files_named_by_label_and_file(caller: Caller) -> None:
    files = [
        ("files", (f"{label}/{index}.png", data, "image/png")) for index, (label, data) in enumerate(PICTURES)
    ]
    found = caller.call("POST", "/adapt", data={"adapter": "things", "fit": "true"}, files=files)
    assert found["examples"]["added"] == len(PICTURES)
    answer = caller.call(
        "POST", "/predict", data={"adapter": "things"}, files={"x": ("x.png", UNSEEN["cow"])}
    )
    assert answer["predictions"][0]["label"] == "animal"


def test_text_files_too(caller: Caller) -> None:
    files = [("files", (f"good/{index}.txt", text, "text/plain")) for index, text in enumerate(PRAISE)]
    files += [
        ("files", (f"films\\bad\\{index}.txt", text, "application/octet-stream"))
        for index, text in enumerate(BLAME)
    ]
    files += [("files", ("none.txt", "no label", "text/plain"))]
    found = caller.call("POST", "/adapt", data={"adapter": "films"}, files=files)
    assert found["backbone"] == "minilm-l6-v2"
    assert found["examples"]["added"] == 12
    assert [(one["index"], one["code"]) for one in found["examples"]["rejected"]] == [(12, "label_missing")]


def test_two_labels_with_one_example_each_are_enough(caller: Caller) -> None:
    found = caller.adapt("films", reviews(1))
    assert found["live"]
    assert found["report"]["accuracy"] is None
    answer = caller.predict("films", [{"text": PRAISE[0]}, {"text": BLAME[0]}])
    assert [one["label"] for one in answer["predictions"]] == ["good", "bad"]


def test_one_label_in_total_stores_nothing(caller: Caller) -> None:
    body = {"adapter": "films", "examples": [{"text": text, "label": "good"} for text in PRAISE]}
    assert caller.code("POST", "/adapt", 422, json=body) == "one_label"
    caller.call("GET", "/adapters/films", 404)
    assert caller.call("GET", "/adapters")["adapters"] == []


def test_examples_in_parts_then_one_fit(caller: Caller) -> None:
    first = caller.adapt("films", reviews()[::2], fit=False)
    assert (first["version"], first["live"], first["report"]) == (None, False, None)
    assert caller.code("POST", "/predict", 409, json={"adapter": "films", "inputs": [{"text": "x"}]}) == (
        "no_live_version"
    )
    caller.adapt("films", reviews()[1::2], fit=False)
    found = caller.adapt("films", [])
    assert (found["version"], found["live"]) == (1, True)
    assert found["examples"] == {"total": 12, "added": 0, "replaced": 0, "removed": 0, "rejected": []}
    together = caller.adapt("at-once", reviews())
    assert found["report"]["accuracy"] == together["report"]["accuracy"]
    inputs = [{"text": "Wonderful"}, {"text": "Rather a waste"}]
    answers = [caller.predict(name, inputs)["predictions"] for name in ("films", "at-once")]
    assert same(*answers)


def test_the_same_examples_in_another_order_give_the_same_head(caller: Caller) -> None:
    caller.adapt("forth", reviews())
    caller.adapt("back", reviews()[::-1])
    inputs = [{"text": text} for text in (*PRAISE, "Something else")]
    answers = [caller.predict(name, inputs)["predictions"] for name in ("forth", "back")]
    assert same(*answers)


def test_a_known_id_replaces_its_example(caller: Caller) -> None:
    caller.adapt("films", reviews())
    found = caller.adapt("films", [{"id": "good0", "text": "Splendid", "label": "good"}])
    assert found["examples"] == {"total": 12, "added": 0, "replaced": 1, "removed": 0, "rejected": []}
    assert found["version"] == 2
    assert caller.call("GET", "/adapters/films/examples/good0")["text"] == "Splendid"


def test_an_input_without_an_id_is_not_duplicated(caller: Caller) -> None:
    examples = [{key: value for key, value in one.items() if key != "id"} for one in reviews()]
    caller.adapt("films", examples)
    found = caller.adapt("films", examples[:1])
    assert (found["examples"]["total"], found["examples"]["replaced"]) == (12, 1)
    # Known inputs are not embedded again.
    assert "embed" not in found["timing_ms"]


def test_replace_forgets_all_others(caller: Caller) -> None:
    caller.adapt("films", reviews())
    found = caller.adapt("films", reviews()[:4], update="replace")
    assert found["examples"]["total"] == 4
    assert found["examples"]["removed"] == 8
    assert "embed" not in found["timing_ms"]
    # The version before can be rolled back to.
    caller.call("PUT", "/adapters/films/aliases/live", json={"version": 1})
    assert caller.predict("films", [{"text": "Wonderful"}], explain=12)["version"] == 1


def test_a_new_label_is_learnt(caller: Caller) -> None:
    caller.adapt("films", reviews())
    mixed = [
        {"text": f"The film was shown in {year} in twelve cinemas", "label": "neutral"}
        for year in range(1990, 1996)
    ]
    found = caller.adapt("films", mixed)
    assert found["live"]
    assert found["report"]["promotion"]["reason"] == "label_added"
    answer = caller.predict("films", [{"text": "It was shown in 2004 in nine cinemas"}])
    assert answer["predictions"][0]["label"] == "neutral"


def test_a_version_that_is_worse_is_withheld(caller: Caller) -> None:
    caller.adapt("films", reviews())
    wrong = [
        {"id": f"w{index}", "text": one["text"] + "!", "label": "bad" if one["label"] == "good" else "good"}
        for index, one in enumerate(reviews())
    ]
    found = caller.adapt("films", wrong)
    decision = found["report"]["promotion"]
    assert (found["live"], decision["promoted"], decision["reason"]) == (False, False, "disagrees")
    assert decision["compared"] == 12
    agreement = decision["agreement"]
    assert agreement["examples"] == 12
    assert agreement["agreed"] < agreement["expected"]
    assert caller.predict("films", [{"text": "Wonderful"}])["version"] == 1
    assert caller.adapt("films", [], promote="always")["live"]


def test_never_leaves_live_where_it_is(caller: Caller) -> None:
    caller.adapt("films", reviews())
    found = caller.adapt("films", reviews(), promote="never")
    assert (found["version"], found["live"]) == (2, False)
    assert caller.call("GET", "/adapters/films")["live"] == 1


def test_multilabel(caller: Caller) -> None:
    examples: list[dict[str, Any]] = [{"text": text, "labels": ["film", "good"]} for text in PRAISE] + [
        {"text": text, "labels": ["film", "bad"]} for text in BLAME
    ]
    examples += [
        {"text": f"Soup of {what} with bread", "labels": []} for what in ("leek", "beans", "corn", "peas")
    ]
    found = caller.adapt("tags", examples, task="multilabel")
    assert 0 <= found["report"]["micro_f1"] <= 1
    (one,) = caller.predict("tags", [{"text": "Loved this film, brilliant"}])["predictions"]
    assert one["labels"] == ["film", "good"]
    assert {part["label"] for part in one["probabilities"]} == {"film", "good", "bad"}


def test_regression(caller: Caller) -> None:
    numbers = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    examples = [{"text": " ".join(["very"] * int(number)) + " good", "target": number} for number in numbers]
    found = caller.adapt("length", examples, task="regression")
    assert {"r2", "rmse"} <= found["report"].keys()
    (one,) = caller.predict("length", [{"text": "very very very very good"}], explain=1)["predictions"]
    assert 1 < one["value"] < 8
    assert "label" not in one
    assert one["nearest"][0]["target"] == 4.0


def test_inputs_need_not_be_kept(caller: Caller) -> None:
    caller.adapt("films", reviews(), keep_inputs=False)
    assert "text" not in caller.call("GET", "/adapters/films/examples/good0")
    found = caller.adapt("films", [{"text": "Great fun", "label": "good"}])
    assert found["examples"]["total"] == 13
    caller.call("DELETE", "/adapters/films/examples/good0")
    assert (
        caller.code("POST", "/adapters/films/rebase", 409, json={"backbone": "minilm-l6-v2"})
        == "inputs_not_kept"
    )


def test_requests_at_once_to_one_adapter_all_count(caller: Caller) -> None:
    start = threading.Barrier(6)

    def adapt(index: int) -> int:
        start.wait()
        part = [PRAISE[index], BLAME[index]]
        examples = [{"text": text, "label": label} for text, label in zip(part, ("good", "bad"), strict=True)]
        version: int = caller.adapt("films", examples)["version"]
        return version

    with ThreadPoolExecutor(6) as pool:
        versions = sorted(pool.map(adapt, range(6)))
    assert versions == [1, 2, 3, 4, 5, 6]
    assert caller.call("GET", "/adapters/films")["examples"] == 12


def test_another_tenants_adapter_is_one_that_does_not_exist(caller: Caller, server: str) -> None:
    caller.adapt("films", reviews())
    other = Caller(server)
    with other.http:
        for method, path in [
            ("GET", "/adapters/films"),
            ("DELETE", "/adapters/films"),
            ("GET", "/adapters/films/versions"),
            ("GET", "/adapters/films/versions/1"),
            ("GET", "/adapters/films/versions/1/export"),
            ("GET", "/adapters/films/examples"),
            ("GET", "/adapters/films/examples/good0"),
            ("DELETE", "/adapters/films/examples/good0"),
        ]:
            mine = other.call(method, path, 404)
            none = other.call(method, path.replace("films", "nothing"), 404)
            assert mine["type"] == none["type"]
            assert mine["detail"].replace("films", "nothing") == none["detail"]
        assert other.call("GET", "/adapters")["adapters"] == []
        body = {"adapter": "films", "inputs": [{"text": "x"}]}
        assert other.code("POST", "/predict", 404, json=body) == "unknown_adapter"


def test_a_caller_that_hangs_up_leaves_all_or_nothing(caller: Caller) -> None:
    started = time.perf_counter()
    caller.call("POST", "/adapt", json={"adapter": "whole", "examples": pictures()})
    whole = time.perf_counter() - started
    hung_up = 0
    for index in range(8):
        # Inputs that the tenant has embedded before are not embedded again.
        body = {"adapter": f"gone{index}", "examples": pictures(salt=bytes([index]))}
        try:
            caller.http.post("/adapt", json=body, timeout=httpx.Timeout(60, read=whole * (index + 0.5) / 8))
        except httpx.TimeoutException:
            hung_up += 1
    assert hung_up >= 3
    found = caller.call("GET", "/adapters")["adapters"]
    for adapter in found:
        assert adapter["live"] == 1
        assert caller.predict(adapter["adapter"], [image(UNSEEN["cow"])])["version"] == 1


def test_examples_have_groups_and_say_whether_they_are_measured_on(caller: Caller) -> None:
    told = [{**one, "group": f"critic {row // 4}"} for row, one in enumerate(reviews())]
    told[-1] |= {"group": None, "sampled": False}
    caller.adapt("films", told)
    page = caller.call("GET", "/adapters/films/examples")["examples"]
    found = {one["id"]: (one["group"], one["sampled"]) for one in page}
    assert found == {one["id"]: (one["group"], one.get("sampled", True)) for one in told}
    one = caller.call("GET", "/adapters/films/examples/bad5")
    assert (one["group"], one["sampled"]) == (None, False)


def test_a_group_that_is_no_name_is_an_error_of_its_example(caller: Caller) -> None:
    told = [{**one, "group": "g"} for one in reviews()] + [
        {"text": "Fine", "label": "good", "group": "x" * 257}
    ]
    rejected = caller.adapt("films", told)["examples"]["rejected"]
    assert [(one["index"], one["code"]) for one in rejected] == [(12, "group_invalid")]
    found = caller.adapt("films", told[-1:], 422)
    assert [(one["pointer"], one["code"]) for one in found["errors"]] == [
        ("/examples/0/group", "group_invalid")
    ]
    for field, value in (("group", 3), ("sampled", "no"), ("sampled", 1)):
        body = {"adapter": "films", "examples": [{"text": "Fine", "label": "good", field: value}]}
        assert caller.code("POST", "/adapt", 422, json=body) == "examples_rejected"


def test_what_is_wanted_of_answers_is_the_adapters_until_it_is_changed(caller: Caller) -> None:
    caller.adapt("films", reviews())
    made = caller.call("GET", "/adapters/films")
    assert (made["answer_accuracy"], made["weights"]) == (0.95, "none")
    caller.adapt("films", [], answer_accuracy=0.8, weights="balanced")
    changed = caller.call("GET", "/adapters/films")
    assert (changed["answer_accuracy"], changed["weights"]) == (0.8, "balanced")
    files = {"x": ("good/1.txt", "Splendid", "text/plain")}
    caller.call("POST", "/adapt", data={"adapter": "films", "answer_accuracy": "0.9"}, files=files)
    changed = caller.call("GET", "/adapters")["adapters"][0]
    assert (changed["answer_accuracy"], changed["weights"]) == (0.9, "balanced")


def test_what_cannot_be_wanted_of_answers(caller: Caller) -> None:
    for field, value in [("answer_accuracy", 0.4), ("answer_accuracy", 1), ("answer_accuracy", float("nan"))]:
        found = caller.adapt("films", reviews(), 422, **{field: value})
        assert found["code"] in ("invalid_request", "invalid_json")
    assert caller.adapt("films", reviews(), 422, weights="some")["code"] == "invalid_request"
    numbers = [{"text": text, "target": float(row)} for row, text in enumerate(PRAISE)]
    found = caller.adapt("stars", numbers, 422, task="regression", weights="balanced")
    assert found["code"] == "weights_not_for_task"
    assert caller.call("GET", "/adapters")["adapters"] == []


def test_texts_of_which_no_word_is_known_teach_nothing(caller: Caller) -> None:
    told = [*reviews(), {"text": "สวัสดี", "label": "good"}, {"text": "👋", "label": "bad"}]
    rejected = caller.adapt("films", told)["examples"]["rejected"]
    assert [(one["index"], one["code"]) for one in rejected] == [
        (12, "no_known_tokens"),
        (13, "no_known_tokens"),
    ]
    assert all("minilm-l6-v2" in one["detail"] for one in rejected)
    body = {"text": "สวัสดีครับ", "label": "good"}
    assert caller.code("POST", "/adapters/films/feedback", 422, json=body) == "no_known_tokens"
    assert caller.call("GET", "/adapters/films")["examples"] == 12


WRONG: list[tuple[Any, str, str]] = [
    ({"text": "wrong", "label": 3}, "label_invalid", "/label"),
    ({"text": "wrong", "labels": ["good", 3]}, "label_invalid", "/labels/1"),
    ({"text": "wrong", "label": "good", "id": 3}, "id_invalid", "/id"),
    ({"text": "wrong", "label": "good", "group": 3}, "group_invalid", "/group"),
    ({"text": 3, "label": "good"}, "invalid_text", "/text"),
    ({"image": 3, "label": "good"}, "invalid_base64", "/image"),
    ({"text": "wrong", "target": "one"}, "target_invalid", "/target"),
    ({"text": "wrong", "lable": "good"}, "unknown_field", "/lable"),
    ({"text": "wrong", "labels": ["good"]}, "label_invalid", "/labels"),
    ({"text": "wrong"}, "label_missing", ""),
    (3, "not_an_object", ""),
]


def test_examples_of_another_form_are_refused_one_by_one(caller: Caller) -> None:
    posted: list[Any] = [*reviews(), *(one for one, _, _ in WRONG)]
    found = caller.adapt("films", posted)["examples"]
    assert (found["added"], found["total"]) == (12, 12)
    told = [(one["index"], one["code"]) for one in found["rejected"]]
    assert told == [(12 + place, code) for place, (_, code, _) in enumerate(WRONG)]
    # A strict request is refused as a whole, and every rejected example is named.
    problem = caller.adapt("films", posted, 422, strict=True)
    assert problem["code"] == "examples_rejected"
    assert [(one["pointer"], one["code"]) for one in problem["errors"]] == [
        (f"/examples/{12 + place}{pointer}", code) for place, (_, code, pointer) in enumerate(WRONG)
    ]


def test_numbers_and_labels_of_other_tasks_are_refused_one_by_one(caller: Caller) -> None:
    many: list[Any] = [
        {"text": text, "labels": [label]} for text, label in (("a b", "x"), ("c d", "y"), ("e f", "x"))
    ]
    found = caller.adapt("many", [*many, {"text": "g h", "labels": [1]}], task="multilabel")["examples"]
    assert [(one["index"], one["code"]) for one in found["rejected"]] == [(3, "label_invalid")]
    sizes: list[Any] = [{"text": "word " * number, "target": number} for number in range(1, 6)]
    found = caller.adapt("sizes", [*sizes, {"text": "x", "target": "6"}], task="regression")["examples"]
    assert [(one["index"], one["code"]) for one in found["rejected"]] == [(5, "target_invalid")]


def test_rejected_examples_are_listed_where_the_request_fails_for_another_reason(caller: Caller) -> None:
    """Two labels were sent; the examples of one were rejected, and what is left has one label."""
    examples: list[Any] = [
        {"text": "a b", "label": "x"},
        {"text": "c d", "label": "x"},
        {"text": " ", "label": "y"},
        {"text": "e f", "label": 3},
        {"text": "g h"},
    ]
    problem = caller.adapt("hidden", examples, 422)
    assert problem["code"] == "one_label"
    assert [(one["pointer"], one["code"]) for one in problem["errors"]] == [
        ("/examples/2/text", "empty_text"),
        ("/examples/3/label", "label_invalid"),
        ("/examples/4", "label_missing"),
    ]
    assert "3 examples were rejected as well" in problem["detail"]
    many: list[Any] = [*examples[:2], *({"text": f"t {n}", "label": n} for n in range(150))]
    assert len(caller.adapt("hidden", many, 422)["errors"]) == 100
    # A fine-tune that has too few examples for a reason says that reason too.
    problem = caller.adapt("tuned", [*reviews(), {"text": "e f", "label": 3}], 422, method="fine_tune")
    assert problem["code"] == "too_few_examples"
    assert [one["pointer"] for one in problem["errors"]] == ["/examples/12/label"]


def test_json_with_a_byte_order_mark_is_read(caller: Caller) -> None:
    body = {"adapter": "films", "examples": [*reviews(), {"text": "long " * 1_000, "label": "good"}]}
    content = b"\xef\xbb\xbf" + json.dumps(body).encode()
    found = caller.call("POST", "/adapt", content=content, headers=JSON)
    assert found["examples"]["rejected"] == []
    kept = caller.call("GET", "/adapters/films/examples")["examples"]
    long = next(one["id"] for one in kept if len(one["id"]) == 64)
    assert caller.call("GET", f"/adapters/films/examples/{long}")["text"] == "long " * 1_000
    content = b"\xef\xbb\xbf" + json.dumps({"text": "fine", "label": "good"}).encode()
    assert caller.call("POST", "/adapters/films/feedback", content=content, headers=JSON)["version"] == 2
