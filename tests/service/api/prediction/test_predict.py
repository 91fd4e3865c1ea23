"""POST /predict, /embed and /v1/embeddings over HTTP."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.service.client import (
    BLAME,
    PICTURES,
    PRAISE,
    UNSEEN,
    Caller,
    image,
    pictures,
    reviews,
    same,
)


@pytest.fixture(scope="module")
def taught(server: str) -> Iterator[Caller]:
    """A tenant with an adapter for texts and one for images."""
    found = Caller(server)
    with found.http:
        found.adapt("films", reviews())
        found.adapt("things", pictures())
        yield found


def test_an_answer_has_sorted_probabilities(taught: Caller) -> None:
    (one,) = taught.predict("things", [image(UNSEEN["cow"])])["predictions"]
    assert one["label"] == one["probabilities"][0]["label"] == "animal"
    chances = [part["probability"] for part in one["probabilities"]]
    assert chances == sorted(chances, reverse=True)
    assert sum(chances) == pytest.approx(1, abs=1e-5)
    assert one["confidence"] == pytest.approx(chances[0], abs=1e-6)
    assert isinstance(one["abstained"], bool)


def test_top_k_bounds_the_probabilities(taught: Caller) -> None:
    for top_k, count in [(1, 1), (2, 2), (1000, 3)]:
        (one,) = taught.predict("things", [image(UNSEEN["cow"])], top_k=top_k)["predictions"]
        assert len(one["probabilities"]) == count


def test_bad_items_are_errors_in_their_places(taught: Caller) -> None:
    good = [image(data) for data in UNSEEN.values()]
    bad: list[dict[str, Any]] = [
        image(b"not an image"),
        {"text": "a text"},
        {"image": "%%%"},
        {},
        {"image": "", "text": ""},
        image(UNSEEN["cow"][:200]),
    ]
    alone = [taught.predict("things", [one])["predictions"][0] for one in good]
    mixed = taught.predict(
        "things", [bad[0], good[0], bad[1], bad[2], good[1], bad[3], bad[4], good[2], bad[5]]
    )
    items = mixed["predictions"]
    assert [index for index, item in enumerate(items) if "error" not in item] == [1, 4, 7]
    assert same([items[1], items[4], items[7]], alone)
    codes = [items[index]["error"]["code"] for index in (0, 2, 3, 5, 6, 8)]
    assert codes[:5] == [
        "undecodable_image",
        "wrong_kind",
        "invalid_base64",
        "input_missing",
        "input_missing",
    ]
    assert codes[5] in ("truncated_image", "undecodable_image")
    assert all(items[index]["error"]["detail"] for index in (0, 2, 3, 5, 6, 8))


def test_texts_of_any_length_beside_each_other_answer_as_alone(taught: Caller) -> None:
    texts = [{"text": text} for text in ["Good", "word " * 2_000, *PRAISE, *BLAME, "", "x" * 200_000]]
    alone = [taught.predict("films", [one])["predictions"][0] for one in texts]
    assert same(taught.predict("films", texts)["predictions"], alone)
    assert [one["error"]["code"] for one in alone if "error" in one] == ["empty_text", "text_too_long"]


def test_only_bad_items_is_still_an_answer(taught: Caller) -> None:
    found = taught.predict("films", [{"text": ""}])
    assert found["predictions"][0]["error"]["code"] == "empty_text"


def test_one_raw_image(taught: Caller) -> None:
    found = taught.call(
        "POST",
        "/predict?adapter=things&top_k=1",
        content=UNSEEN["cow"],
        headers={"Content-Type": "image/png"},
    )
    (one,) = found["predictions"]
    assert (one["label"], len(one["probabilities"])) == ("animal", 1)


def test_one_raw_text(taught: Caller) -> None:
    headers = {"Content-Type": "text/plain; charset=utf-8"}
    found = taught.call(
        "POST", "/predict?adapter=films&version=1&explain=2", content="Wunderschön".encode(), headers=headers
    )
    assert found["version"] == 1
    assert len(found["predictions"][0]["nearest"]) == 2


@pytest.mark.parametrize(
    ("adapter", "media", "content", "code"),
    [
        ("things", "image/png", b"nothing", "undecodable_image"),
        ("things", "image/png", b"", None),
        ("films", "text/plain", b"", "empty_text"),
        ("films", "text/plain", b"\xff\xfe\x00", "invalid_text"),
        ("films", "image/png", b"\x89PNG", "wrong_kind"),
    ],
)
def test_a_raw_input_that_cannot_be_read_is_422(
    taught: Caller, adapter: str, media: str, content: bytes, code: str | None
) -> None:
    headers = {"Content-Type": media}
    found = taught.code("POST", f"/predict?adapter={adapter}", 422, content=content, headers=headers)
    assert code is None or found == code


def test_nearest_examples_are_evidence(taught: Caller) -> None:
    (one,) = taught.predict("films", [{"text": PRAISE[2] + "!"}], explain=3)["predictions"]
    nearest = one["nearest"]
    assert len(nearest) == 3
    assert (nearest[0]["id"], nearest[0]["label"]) == ("good2", "good")
    similarities = [found["similarity"] for found in nearest]
    assert similarities == sorted(similarities, reverse=True)
    assert 0.9 < similarities[0] <= 1.00001
    (asked,) = taught.predict("films", [{"text": "x"}], explain=100)["predictions"]
    assert len(asked["nearest"]) == 12


def test_versions_answer_side_by_side(caller: Caller) -> None:
    caller.adapt("films", reviews())
    turned = [{**one, "label": "bad" if one["label"] == "good" else "good"} for one in reviews()]
    caller.adapt("films", turned, promote="always")
    inputs = [{"text": "Wonderful and moving"}]
    labels = {
        version: caller.predict("films", inputs, version=version)["predictions"][0]["label"]
        for version in (1, 2, None)
    }
    assert labels == {1: "good", 2: "bad", None: "bad"}
    assert caller.predict("films", inputs)["version"] == 2
    body = {"adapter": "films", "version": 3, "inputs": inputs}
    assert caller.code("POST", "/predict", 404, json=body) == "unknown_version"


def test_what_is_promoted_answers_at_once(caller: Caller) -> None:
    caller.adapt("films", reviews())
    epoch = 0
    for _ in range(5):
        found = caller.adapt("films", [], promote="always")
        assert found["epoch"] > epoch
        epoch = found["epoch"]
        assert caller.predict("films", [{"text": "x"}], min_epoch=epoch)["version"] == found["version"]


def test_a_recreated_adapter_never_answers_with_old_heads(caller: Caller) -> None:
    for label in ("one", "two", "three"):
        examples = [{"text": PRAISE[0], "label": label}, {"text": BLAME[0], "label": "other"}]
        assert caller.adapt("films", examples)["version"] == 1
        (one,) = caller.predict("films", [{"text": PRAISE[0]}])["predictions"]
        assert one["label"] == label
        caller.call("DELETE", "/adapters/films")
        body = {"adapter": "films", "inputs": [{"text": "x"}]}
        assert caller.code("POST", "/predict", 404, json=body) == "unknown_adapter"


def test_embeddings_are_those_of_the_backbone(taught: Caller) -> None:
    found = taught.call(
        "POST",
        "/embed",
        json={"backbone": "minilm-l6-v2", "inputs": [{"text": "a"}, {"text": ""}, {"text": "b"}]},
    )
    assert found["dim"] == 384
    assert found["embeddings"][1]["error"]["code"] == "empty_text"
    vectors = [np.array(found["embeddings"][index]["embedding"]) for index in (0, 2)]
    assert all(np.linalg.norm(vector) == pytest.approx(1, abs=1e-5) for vector in vectors)
    (raw,) = taught.call(
        "POST", "/embed?backbone=minilm-l6-v2", content=b"a", headers={"Content-Type": "text/plain"}
    )["embeddings"]
    assert np.allclose(raw["embedding"], vectors[0], atol=1e-5)


def test_images_are_embedded_as_files(taught: Caller) -> None:
    files = [("x", (f"{index}.png", data, "image/png")) for index, (_, data) in enumerate(PICTURES[:3])]
    found = taught.call("POST", "/embed", data={"backbone": "efficientnet-lite0"}, files=files)
    assert [len(one["embedding"]) for one in found["embeddings"]] == [1280] * 3


def test_openai_clients_get_what_they_expect(taught: Caller) -> None:
    body = {"model": "minilm-l6-v2", "input": ["hello world", "good night"], "user": "u"}
    plain = taught.call("POST", "/v1/embeddings", json=body)
    assert (plain["object"], plain["model"]) == ("list", "minilm-l6-v2")
    assert [one["index"] for one in plain["data"]] == [0, 1]
    # [CLS], two words, [SEP], twice.
    assert plain["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    packed = taught.call("POST", "/v1/embeddings", json={**body, "encoding_format": "base64"})
    for one, other in zip(plain["data"], packed["data"], strict=True):
        unpacked = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        assert np.allclose(one["embedding"], unpacked, atol=1e-6)
    single = taught.call("POST", "/v1/embeddings", json={**body, "input": "hello world", "dimensions": 384})
    assert len(single["data"]) == 1


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"input": []}, "no_inputs", None),
        ({"input": ""}, "invalid_input", "/input"),
        ({"input": ["fine", ""]}, "invalid_input", "/input/1"),
        ({"input": ["fine"] * 200 + [" "]}, "invalid_input", "/input/200"),
        ({"input": 5}, "invalid_request", "/input"),
        ({"input": ["fine", None]}, "invalid_request", "/input/1"),
        ({"dimensions": 10}, "invalid_dimensions", "/dimensions"),
        ({"model": "text-embedding-3-small"}, "model_not_found", None),
        ({"model": "efficientnet-lite0"}, "model_not_found", None),
        ({"encoding_format": "int8"}, "invalid_request", "/encoding_format"),
        ({"enc": "float"}, "invalid_request", "/enc"),
    ],
)
def test_openai_clients_are_told_what_is_wrong(
    taught: Caller, change: dict[str, Any], code: str, param: str | None
) -> None:
    body = {"model": "minilm-l6-v2", "input": "hello", **change}
    status = 404 if code == "model_not_found" else 422
    error = taught.call("POST", "/v1/embeddings", status, json=body)["error"]
    assert (error["code"], error["param"]) == (code, param)


@pytest.mark.parametrize("ids", [[15339, 1917], [[15339, 1917], [5]], list(range(5_000))])
def test_token_ids_are_refused_with_what_to_send(taught: Caller, ids: Any) -> None:
    problem = taught.call("POST", "/v1/embeddings", 422, json={"model": "minilm-l6-v2", "input": ids})
    assert problem["errors"][0] == {
        "pointer": "/input/0",
        "code": "token_ids",
        "detail": "Token ids are not supported. Send text.",
    }
    assert problem["error"]["message"].endswith("Token ids are not supported. Send text.")
    assert len(problem["errors"]) <= 100


def test_as_many_texts_as_openai_takes_are_embedded_in_their_order(taught: Caller) -> None:
    texts = [f"text number {number}" for number in range(2_048)]
    body = {"model": "minilm-l6-v2", "input": texts, "encoding_format": "base64"}
    found = taught.call("POST", "/v1/embeddings", json=body)
    assert [one["index"] for one in found["data"]] == list(range(2_048))
    some = [0, 31, 32, 1_000, 2_047]
    alone = taught.call("POST", "/v1/embeddings", json={**body, "input": [texts[place] for place in some]})
    for place, other in zip(some, alone["data"], strict=True):
        first, second = (
            np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in (found["data"][place], other)
        )
        assert np.allclose(first, second, atol=1e-5)
    more = {**body, "input": [*texts, "one more"]}
    assert taught.code("POST", "/v1/embeddings", 413, json=more) == "too_many_items"


def test_models_are_listed_as_openai_lists_them(taught: Caller) -> None:
    found = taught.call("GET", "/v1/models")
    assert found["object"] == "list"
    # Only what /v1/embeddings takes.
    assert [one["id"] for one in found["data"]] == ["minilm-l6-v2"]
    one = taught.call("GET", "/v1/models/minilm-l6-v2")
    assert one == found["data"][0]
    assert one.keys() == {"id", "object", "created", "owned_by"}
    assert one["created"] > 1_600_000_000


def test_texts_may_be_sent_as_they_are(taught: Caller) -> None:
    texts = ["Lovely", "x" * 2_000]
    plain = [{"text": text} for text in texts]
    assert taught.predict("films", texts)["predictions"] == taught.predict("films", plain)["predictions"]  # type: ignore[arg-type]
    for inputs in (texts, [texts[0], plain[1]]):
        body = {"backbone": "minilm-l6-v2", "inputs": inputs}
        assert len(taught.call("POST", "/embed", json=body)["embeddings"]) == 2


def test_an_input_of_another_form_is_an_error_in_its_place(taught: Caller) -> None:
    inputs: list[Any] = [
        {"text": "Lovely"},
        {"text": 5},
        {"image": 5},
        5,
        None,
        ["Lovely"],
        {"txt": "Lovely"},
        {"text": "Awful"},
    ]
    found = taught.predict("films", inputs)["predictions"]
    codes = [one["error"]["code"] if "error" in one else None for one in found]
    assert codes == [
        None,
        "invalid_text",
        "invalid_base64",
        "not_an_object",
        "not_an_object",
        "not_an_object",
        "unknown_field",
        None,
    ]
    body = {"backbone": "minilm-l6-v2", "inputs": inputs}
    embedded = taught.call("POST", "/embed", json=body)["embeddings"]
    assert [one["error"]["code"] if "error" in one else None for one in embedded] == codes


def test_backbones_say_what_they_are(taught: Caller) -> None:
    found = {one["name"]: one for one in taught.call("GET", "/backbones")["backbones"]}
    assert {"efficientnet-lite0", "minilm-l6-v2"} <= found.keys()
    one = found["minilm-l6-v2"]
    assert (one["kind"], one["dim"], one["licence"], one["device"]) == ("text", 384, "Apache-2.0", "cpu")
    assert len(one["fingerprint"]) == 64


def test_texts_of_which_no_word_is_known_are_abstained_from(taught: Caller) -> None:
    texts = [{"text": text} for text in ("สวัสดี", "😡😡😡", PRAISE[0], "ok สวัสดี")]
    found = taught.predict("films", texts)["predictions"]
    assert [one["abstained"] for one in found[:2]] == [True, True]
    reasons = [one["abstention_reason"] for one in found]
    # Twelve examples may be too few to measure, which comes first.
    assert set(reasons[:2]) <= {"no_known_tokens", "not_measured"}
    assert "no_known_tokens" not in reasons[2:]
    assert {one["label"] for one in found} <= {"good", "bad"}
    embedded = taught.call("POST", "/embed", json={"backbone": "minilm-l6-v2", "inputs": texts[:1]})
    assert len(embedded["embeddings"][0]["embedding"]) == 384


def test_probabilities_have_six_digits_and_an_answer_says_why_it_is_abstained(taught: Caller) -> None:
    reasons = {None, "not_measured", "far_from_examples", "low_confidence"}
    for adapter, inputs in [
        ("things", [image(data) for data in UNSEEN.values()]),
        ("films", [{"text": "Good"}]),
    ]:
        for one in taught.predict(adapter, inputs, top_k=10)["predictions"]:
            chances = [one["confidence"], *(part["probability"] for part in one["probabilities"])]
            assert all(0 < chance < 1 and chance == round(chance, 6) for chance in chances)
            assert one["abstention_reason"] in reasons
            assert one["abstained"] == (one["abstention_reason"] is not None)


def test_an_answer_of_several_labels_names_those_that_are_uncertain(caller: Caller) -> None:
    told = [{"text": text, "labels": ["film", "good"]} for text in PRAISE]
    told += [{"text": text, "labels": ["film", "bad"]} for text in BLAME]
    caller.adapt("tags", told, task="multilabel")
    for top_k in (1, 3):
        (one,) = caller.predict("tags", [{"text": PRAISE[0]}], top_k=top_k)["predictions"]
        shown = {*one["labels"], *(part["label"] for part in one["probabilities"])}
        assert set(one["uncertain"]) <= shown


def test_the_distance_has_a_limit_of_one(caller: Caller) -> None:
    caller.adapt("things", pictures(), task="classification")
    tagged = [{**image(data), "labels": [label]} for label, data in PICTURES]
    caller.adapt("tags", tagged, task="multilabel")
    caller.adapt("sizes", [{**image(data), "target": len(data)} for _, data in PICTURES], task="regression")
    caller.adapt("few", pictures(2))
    noise = Image.effect_noise((64, 64), 90)
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    inputs = [*(image(data) for data in UNSEEN.values()), image(PICTURES[0][1]), image(buffer.getvalue())]
    for adapter in ("things", "tags", "sizes"):
        answers = caller.predict(adapter, inputs)["predictions"]
        alone = [caller.predict(adapter, [one])["predictions"][0] for one in inputs]
        for one, other in zip(answers, alone, strict=True):
            assert one["distance"] == pytest.approx(other["distance"], abs=1e-4)
            assert one["distance"] > 0
            assert one["abstention_score"] >= 0
            assert (one["abstention_reason"] == "far_from_examples") == (one["distance"] > 1)
        # An example is near to itself, and noise to nothing.
        assert answers[-2]["distance"] < answers[-1]["distance"]
        assert answers[-1]["distance"] > 1
    assert caller.predict("few", inputs)["predictions"][0]["distance"] is None


def test_the_stages_add_up_to_the_total(caller: Caller) -> None:
    """Also where several threads work on the inputs of one request at once."""
    many = [image(data + bytes([place])) for place in range(4) for _, data in PICTURES]
    body = {"backbone": "efficientnet-lite0", "inputs": many}
    found = [
        caller.adapt("things", pictures()),
        caller.adapt("films", reviews()),
        caller.predict("things", many),
        caller.predict("films", ["Lovely"]),  # type: ignore[list-item]
        caller.call("POST", "/embed", json=body),
        caller.call("POST", "/adapters/films/feedback", json={"text": "Fine", "label": "good"}),
        caller.call("POST", "/adapters/films/rebase", json={"backbone": "minilm-l6-v2"}),
        caller.call("DELETE", "/adapters/films/examples/good1"),
    ]
    for one in found:
        timing = one["timing_ms"]
        assert timing["total"] > 0
        assert min(timing.values()) >= 0
        stages = sum(value for stage, value in timing.items() if stage != "total")
        assert stages == pytest.approx(timing["total"], abs=0.01), timing
