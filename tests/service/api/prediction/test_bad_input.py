"""Bad input over HTTP: each is refused for what it is, the service goes on, and nothing is half-written."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from benchmarks.harness.service_process import Serving
from tests.support.models.png_bombs import bomb, png_header
from tests.support.service.client import JSON, PICTURES, UNSEEN, Caller, image, pictures, reviews


@pytest.fixture(scope="module")
def taught(server: str) -> Iterator[tuple[Caller, Any]]:
    """A tenant with one adapter for each kind, and what it sees."""
    found = Caller(server)
    with found.http:
        found.adapt("films", reviews())
        found.adapt("things", pictures())
        yield found, snapshot(found)


@pytest.fixture
def going_on(taught: tuple[Caller, Any]) -> Iterator[Caller]:
    """The tenant, whose adapters must be the same and answer the same after the test."""
    found, before = taught
    yield found
    assert snapshot(found) == before


def snapshot(caller: Caller) -> Any:
    """All that a tenant can see of its adapters, and one answer of each."""
    adapters = caller.call("GET", "/adapters")["adapters"]
    return [
        adapters,
        [caller.call("GET", f"/adapters/{one['adapter']}/examples?limit=1000") for one in adapters],
        [caller.call("GET", f"/adapters/{one['adapter']}/versions") for one in adapters],
        caller.predict("films", [{"text": "Lovely"}])["predictions"],
        caller.predict("things", [image(UNSEEN["cow"])])["predictions"],
    ]


BAD_IMAGES: dict[str, tuple[bytes, set[str]]] = {
    "not an image": (b"this is not an image", {"undecodable_image"}),
    "truncated": (UNSEEN["cow"][: len(UNSEEN["cow"]) // 2], {"truncated_image"}),
    "bomb": (bomb(), {"image_too_large"}),
    "header only": (png_header(100_000, 100_000), {"image_too_large"}),
    "zero pixels": (png_header(0, 10), {"empty_image", "undecodable_image"}),
    "no bytes": (b"", {"empty_image", "undecodable_image"}),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", {"undecodable_image", "unsupported_image"}),
    "17 MB": (PICTURES[0][1] + b"\0" * (17 << 20), {"image_too_large"}),
}
BAD_TEXTS: dict[str, tuple[str, set[str]]] = {
    "empty": ("", {"empty_text"}),
    "white space": (" \n\t", {"empty_text"}),
    "1 MB": ("a " * (1 << 19), {"text_too_long"}),
    "NUL": ("a\0b", {"invalid_text"}),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_that_cannot_be_used(going_on: Caller, name: str) -> None:
    data, codes = BAD_IMAGES[name]
    good = [image(one) for one in UNSEEN.values()]
    alone = going_on.predict("things", good)["predictions"]
    found = going_on.predict("things", [good[0], image(data), *good[1:]])["predictions"]
    assert found[1]["error"]["code"] in codes
    assert [one["label"] for one in (found[0], *found[2:])] == [one["label"] for one in alone]
    for one, other in zip((found[0], *found[2:]), alone, strict=True):
        assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-5)
    raw = going_on.code(
        "POST", "/predict?adapter=things", 422, content=data, headers={"Content-Type": "image/png"}
    )
    assert raw in codes
    rejects(going_on, image(data), codes, "things", pictures(), "image")


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_text_that_cannot_be_used(going_on: Caller, name: str) -> None:
    text, codes = BAD_TEXTS[name]
    (found,) = going_on.predict("films", [{"text": text}])["predictions"]
    assert found["error"]["code"] in codes
    rejects(going_on, {"text": text}, codes, "films", reviews(), "text")


def rejects(
    caller: Caller, value: dict[str, Any], codes: set[str], adapter: str, rest: Any, field: str
) -> None:
    """/adapt lists the example, refuses it where it is alone, and refuses all of them where it is strict."""
    bad = {**value, "id": "bad", "label": "x"}
    body = {"adapter": adapter, "examples": [bad]}
    problem = caller.call("POST", "/adapt", 422, json=body)
    assert problem["code"] == "examples_rejected"
    assert problem["errors"][0]["pointer"] == f"/examples/0/{field}"
    assert problem["errors"][0]["code"] in codes
    strict = {"adapter": adapter, "examples": [*rest, bad], "strict": True}
    problem = caller.call("POST", "/adapt", 422, json=strict)
    assert [one["pointer"] for one in problem["errors"]] == [f"/examples/{len(rest)}/{field}"]
    found = caller.adapt("other", [rest[0], bad, *rest[1:]])
    assert [(one["index"], one["id"]) for one in found["examples"]["rejected"]] == [(1, "bad")]
    assert found["examples"]["rejected"][0]["code"] in codes
    assert found["examples"]["total"] == len(rest)
    assert {one["label"] for one in rest} == set(found["report"]["per_label"])
    caller.call("DELETE", "/adapters/other")


LABELS: list[tuple[list[dict[str, Any]], dict[int, str]]] = [
    ([{"text": "no label"}], {0: "label_missing"}),
    ([{"text": "blank", "label": "  "}], {0: "label_missing"}),
    ([{"text": "long", "label": "x" * 65_536}], {0: "label_too_long"}),
    ([{"text": "control", "label": "a\nb"}], {0: "label_invalid"}),
    ([{"text": "list", "labels": ["a"]}], {0: "label_invalid"}),
    ([{"text": "number", "target": 3}], {0: "label_invalid"}),
    ([{"text": "two fields", "label": "a", "target": 3}], {0: "label_invalid"}),
    (
        [{"id": "q", "text": "a", "label": "x"}, {"id": "q", "text": "a", "label": "y"}],
        dict.fromkeys((0, 1), "conflicting_labels"),
    ),
    (
        [{"id": "q", "text": "a", "label": "x"}, {"id": "q", "text": "b", "label": "x"}],
        dict.fromkeys((0, 1), "conflicting_inputs"),
    ),
    ([{"text": "collides", "label": "\uff47\uff4f\uff4f\uff44"}], {0: "label_collision"}),
    ([{"text": "an id", "id": "a\0b", "label": "good"}], {0: "id_invalid"}),
    ([{"text": "base64", "image": "AAAA", "label": "good"}], {0: "input_missing"}),
    ([{"label": "good"}], {0: "input_missing"}),
    ([{"image": "no base64!", "label": "good"}], {0: "invalid_base64"}),
    ([{**image(UNSEEN["cow"]), "label": "good"}], {0: "wrong_kind"}),
]


@pytest.mark.parametrize(
    ("bad", "codes"),
    LABELS,
    ids=[str(next(iter(codes.values()))) + f"-{index}" for index, (_, codes) in enumerate(LABELS)],
)
def test_an_example_that_cannot_be_used(
    going_on: Caller, bad: list[dict[str, Any]], codes: dict[int, str]
) -> None:
    problem = going_on.call("POST", "/adapt", 422, json={"adapter": "films", "examples": bad})
    assert {index: one["code"] for index, one in enumerate(problem["errors"])} == codes
    going_on.call(
        "POST", "/adapt", 422, json={"adapter": "films", "examples": [*reviews(), *bad], "strict": True}
    )
    found = going_on.adapt("other", [*reviews(), *bad], backbone="minilm-l6-v2")
    rejected = {one["index"] - 12: one["code"] for one in found["examples"]["rejected"]}
    assert rejected == codes
    assert found["examples"]["total"] == 12
    going_on.call("DELETE", "/adapters/other")


def test_labels_that_are_equal_after_normalisation_are_one(caller: Caller) -> None:
    examples = [
        {"text": "one", "label": "caf\u00e9"},
        {"text": "two", "label": "cafe\u0301"},
        {"text": "three", "label": "bar"},
    ]
    found = caller.adapt("places", examples)
    assert found["examples"]["rejected"] == []
    assert set(found["report"]["per_label"]) == {"caf\u00e9", "bar"}


@pytest.mark.parametrize("target", ["NaN", "Infinity", "-Infinity", "1e999", "1e38"])
def test_a_target_that_is_not_finite(caller: Caller, target: str) -> None:
    body = (
        '{"adapter": "length", "task": "regression", "examples": ['
        '{"text": "a", "target": 1}, {"text": "b", "target": 2.5}, {"text": "c", "target": %s}]}'
    )
    found = caller.call("POST", "/adapt", content=body % target, headers=JSON)
    assert [(one["index"], one["code"]) for one in found["examples"]["rejected"]] == [
        (2, "target_not_finite")
    ]


TUNED: dict[str, Any] = {"adapter": "films", "method": "fine_tune", "examples": []}


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ([], ""),
        ("text", ""),
        (None, ""),
        ({"adapter": "films", "examples": {}}, "/examples"),
        ({"adapter": "films", "exampels": []}, "/exampels"),
        ({"adapter": "films", "fit": "yes"}, "/fit"),
        ({"adapter": "films", "update": "merge"}, "/update"),
        ({"adapter": "films", "method": "boosting"}, "/method"),
        ({**TUNED, "fine_tune": {"batch": 256}}, "/fine_tune/batch"),
        ({**TUNED, "fine_tune": {"batch": 65, "pixels": 32}}, "/fine_tune/batch"),
        ({**TUNED, "fine_tune": {"batch": 64, "pixels": 225}}, "/fine_tune"),
        ({**TUNED, "fine_tune": {"pixels": 512}}, "/fine_tune"),
        ({**TUNED, "fine_tune": {"batch": 2, "pixels": 513}}, "/fine_tune/pixels"),
        ({"adapter": 5}, "/adapter"),
        ({"adapter": "No Such Name"}, "/adapter"),
        ({"adapter": "../../etc"}, "/adapter"),
        ({"adapter": "a" * 64}, "/adapter"),
        ({"adapter": "a\n"}, "/adapter"),
        ({}, ""),
    ],
)
def test_json_of_another_form(going_on: Caller, body: Any, pointer: str) -> None:
    problem = (
        going_on.call("POST", "/adapt", 422, json=body)
        if body is not None
        else going_on.call("POST", "/adapt", 422, content=b"null", headers=JSON)
    )
    assert problem["code"] == "invalid_request"
    assert pointer in [one["pointer"] for one in problem["errors"]]


def test_a_batch_that_memory_has_no_room_for_is_refused_with_what_it_has_room_for(going_on: Caller) -> None:
    problem = going_on.call("POST", "/adapt", 422, json={**TUNED, "fine_tune": {"pixels": 512}})
    assert "at most 12 images, not 16" in problem["errors"][0]["detail"]
    # Refused for another reason: what it has room for is taken.
    for fits in ({"batch": 64, "pixels": 224}, {"batch": 12, "pixels": 512}):
        assert going_on.code("POST", "/adapt", 422, json={**TUNED, "fine_tune": fits}) == "too_few_examples"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1",
        b'{"adapter": "films"',
        b'{"adapter": "\xff\xfe"}',
        b'{"adapter": "\\ud800"}',
        b"[" * 50_000,
    ],
)
def test_what_is_not_json(going_on: Caller, content: bytes) -> None:
    for path in ("/adapt", "/predict", "/embed", "/v1/embeddings", "/adapters/films/feedback"):
        assert going_on.code("POST", path, 400, content=content, headers=JSON) == "invalid_json"


def test_images_and_texts_mixed(going_on: Caller) -> None:
    mixed = [*reviews(), *pictures()]
    assert going_on.code("POST", "/adapt", 422, json={"adapter": "new", "examples": mixed}) == "mixed_inputs"
    found = going_on.adapt("new", mixed, backbone="efficientnet-lite0")
    assert {one["code"] for one in found["examples"]["rejected"]} == {"wrong_kind"}
    assert (found["examples"]["total"], len(found["examples"]["rejected"])) == (12, 12)
    going_on.call("DELETE", "/adapters/new")


def test_what_is_not_there(going_on: Caller) -> None:
    some = [{"text": "x"}]
    for name in ("nothing", "no%20name", "%F0", "a" * 200, "..%2f..%2fetc"):
        assert going_on.code("GET", f"/adapters/{name}", 404) in ("unknown_adapter", "not_found")
    assert (
        going_on.code("POST", "/predict", 404, json={"adapter": "nothing", "inputs": some})
        == "unknown_adapter"
    )
    assert going_on.code("POST", "/adapt", 404, json={"adapter": "nothing"}) == "unknown_adapter"
    assert going_on.code(
        "POST", "/predict", 404, json={"adapter": "films", "version": 9, "inputs": some}
    ) == ("unknown_version")
    assert going_on.code("GET", "/adapters/films/versions/9", 404) == "unknown_version"
    assert going_on.code("GET", "/adapters/films/versions/9/export", 404) == "unknown_version"
    assert going_on.code("PUT", "/adapters/films/aliases/live", 404, json={"version": 9}) == "unknown_version"
    assert going_on.code("GET", "/adapters/films/examples/none", 404) == "unknown_example"
    assert going_on.code("DELETE", "/adapters/films/examples/none", 404) == "unknown_example"
    new = {"adapter": "new", "backbone": "resnet-9000", "examples": reviews()}
    assert going_on.code("POST", "/adapt", 422, json=new) == "unknown_backbone"
    assert going_on.code("POST", "/embed", 422, json={"backbone": "x", "inputs": some}) == "unknown_backbone"
    assert going_on.code("POST", "/adapters/films/rebase", 422, json={"backbone": "x"}) == "unknown_backbone"
    for number in ("0", "-1", "one", str(2**31), "9" * 100):
        assert going_on.code("GET", f"/adapters/films/versions/{number}", 422) == "invalid_request"


def test_a_job_that_cannot_be_answers_like_one_that_is_not_there(tmp_path: Path, postgres_url: str) -> None:
    """PostgreSQL rejects NUL in every text, also in comparisons."""
    settings = {
        "TOPWORK_BACKBONES": "minilm-l6-v2",
        "TOPWORK_WORKERS": "0",
        "TOPWORK_DATABASE_URL": postgres_url,
    }
    with Serving(tmp_path, environment=settings) as running, Caller(running.url).http as http:

        def answer(method: str, path: str, job: str) -> tuple[int, str]:
            found = http.request(method, path.format(quote(job, safe="")))
            text = found.text.replace(repr(job)[1:-1].replace("\\", "\\\\"), "<job>")
            return found.status_code, text.replace(found.headers["x-request-id"], "<id>")

        for method, path in (("GET", "/jobs/{}"), ("GET", "/jobs/{}/events"), ("POST", "/jobs/{}/cancel")):
            nobodys = answer(method, path, "0" * 32)
            assert nobodys[0] == 404
            for job in ("0" * 31, "A" * 32, "jobless"):
                assert answer(method, path, job) == nobodys
            assert answer(method, path, "0" * 31 + "\0")[0] == 400
        for adapter in ("nothing", "%00", "a%00", "No%20Name", "a" * 64, ""):
            page = http.get(f"/jobs?adapter={adapter}")
            assert (page.status_code, page.json()) == (200, {"jobs": [], "next": None})
        nul = base64.urlsafe_b64encode(b"a\0").decode()
        for path in ("/jobs", "/adapters", "/adapters/nothing/examples"):
            page = http.get(f"{path}?cursor={nul}")
            assert (page.status_code, page.json()["code"]) == (422, "invalid_cursor")


def test_what_was_fixed_at_creation(going_on: Caller) -> None:
    def changed(**change: Any) -> str:
        return going_on.code(
            "POST", "/adapt", 409, json={"adapter": "films", "examples": reviews(), **change}
        )

    assert changed(task="multilabel") == "task_changed"
    assert changed(task="regression") == "task_changed"
    assert changed(backbone="efficientnet-lite0") == "backbone_changed"
    assert changed(keep_inputs=False) == "keep_inputs_changed"


def test_the_wrong_kind_for_the_backbone(going_on: Caller) -> None:
    body = {"adapter": "new", "backbone": "efficientnet-lite0", "examples": reviews()}
    problem = going_on.call("POST", "/adapt", 422, json=body)
    assert {one["code"] for one in problem["errors"]} == {"wrong_kind"}
    assert (
        going_on.code("POST", "/adapters/films/rebase", 422, json={"backbone": "efficientnet-lite0"})
        == "wrong_kind"
    )


def test_too_many_items(going_on: Caller) -> None:
    many = [{"text": str(index), "label": "ab"[index % 2]} for index in range(1_001)]
    assert (
        going_on.code("POST", "/adapt", 413, json={"adapter": "films", "examples": many}) == "too_many_items"
    )
    inputs = [{"text": str(index)} for index in range(129)]
    assert (
        going_on.code("POST", "/predict", 413, json={"adapter": "films", "inputs": inputs})
        == "too_many_items"
    )
    body = {"backbone": "minilm-l6-v2", "inputs": inputs}
    assert going_on.code("POST", "/embed", 413, json=body) == "too_many_items"
    files = [("x", (f"a/{index}.txt", "x", "text/plain")) for index in range(129)]
    assert going_on.code("POST", "/predict", 413, data={"adapter": "films"}, files=files) == "too_many_items"
    flood = b'{"adapter": "films", "examples": [' + b"1," * 2_000_000 + b"1]}"
    assert going_on.code("POST", "/adapt", 413, content=flood, headers=JSON) == "body_too_large"
    assert going_on.code("POST", "/predict", 422, json={"adapter": "films", "inputs": []}) == "no_inputs"


def test_a_body_too_large(going_on: Caller) -> None:
    too_large = 64 * (1 << 20) + 1
    # The length alone is enough: the body is not waited for.
    where = going_on.http.base_url
    connection = http.client.HTTPConnection(where.host, where.port, timeout=30)
    connection.putrequest("POST", "/adapt")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(too_large))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()

    def streamed(beginning: bytes) -> Iterator[bytes]:
        # Just too many, for a connection that ends while more is being sent may take the answer along.
        yield beginning
        yield from [b" " * (1 << 20)] * 64

    part = b'--x\r\nContent-Disposition: form-data; name="f"; filename="a/b.png"\r\n\r\n'
    for media, beginning in (
        ("application/json", b" "),
        ("image/png", b" "),
        ("multipart/form-data; boundary=x", part),
    ):
        headers = {"Content-Type": media}
        path = "/predict" if media == "application/json" else "/predict?adapter=films"
        found = going_on.code("POST", path, 413, content=streamed(beginning), headers=headers)
        assert found == "body_too_large"


@pytest.mark.parametrize(
    ("path", "media"),
    [
        ("/adapt", "application/x-www-form-urlencoded"),
        ("/predict", "application/x-ndjson"),
        ("/predict", "text/csv"),
        ("/predict", "application/zip"),
        ("/adapt", "image/png"),
        ("/adapt", ""),
        ("/predict", "application/pdf"),
        ("/predict", "text/html"),
        ("/embed", "application/xml"),
        ("/v1/embeddings", "text/plain"),
        ("/adapters/films/feedback", "multipart/form-data; boundary=x"),
    ],
)
def test_media_types_that_are_not_read(going_on: Caller, path: str, media: str) -> None:
    found = going_on.code("POST", path, 415, content=b"x", headers={"Content-Type": media})
    assert found == "unsupported_media_type"


def test_a_compressed_body_is_not_read(going_on: Caller) -> None:
    headers = {**JSON, "Content-Encoding": "gzip"}
    assert going_on.code("POST", "/adapt", 415, content=b"x", headers=headers) == "unsupported_encoding"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"--x",
        b"--x--\r\n",
        b'--x\r\nContent-Disposition: form-data; name="adapter"\r\n\r\nfilms',
        b"--x\r\nContent-Disposition: nonsense\r\n\r\nfilms\r\n--x--\r\n",
        b"\r\n" * 1_000,
    ],
)
def test_multipart_that_cannot_be_read(going_on: Caller, content: bytes) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    response = going_on.http.post("/adapt", content=content, headers=headers)
    assert response.status_code in (400, 422), response.text
    assert response.headers["content-type"] == "application/problem+json"


def test_multipart_without_a_boundary(going_on: Caller) -> None:
    headers = {"Content-Type": "multipart/form-data"}
    assert going_on.code("POST", "/adapt", 400, content=b"x", headers=headers) == "invalid_multipart"


def test_form_fields_of_another_form(going_on: Caller) -> None:
    files = [("x", ("a/b.txt", "text", "text/plain"))]
    problem = going_on.call("POST", "/adapt", 422, data={"adapter": "films", "fit": "perhaps"}, files=files)
    assert problem["errors"][0]["pointer"].endswith("/fit")
    problem = going_on.call("POST", "/adapt", 422, data={"nothing": "films"}, files=files)
    assert {one["pointer"]: one["detail"] for one in problem["errors"]} == {
        "/fields": "The field `adapter` is missing.",
        "/fields/nothing": "There is no field `nothing`.",
    }


def test_query_parameters_of_another_form(going_on: Caller) -> None:
    for query in ("", "?adapter=films&top_k=0", "?adapter=films&version=x", "?adapter=films&colour=red"):
        headers = {"Content-Type": "text/plain"}
        assert (
            going_on.code("POST", f"/predict{query}", 422, content=b"x", headers=headers) == "invalid_request"
        )


def test_a_tenant_that_cannot_be(server: str) -> None:
    for tenant in ("", "UPPER", "a/b", "..", "a" * 64):
        response = httpx.get(f"{server}/adapters", headers={"X-Tenant": tenant})
        assert response.status_code == 422
        assert response.json()["code"] == "invalid_tenant"


def test_deep_and_odd_json_is_only_json(going_on: Caller) -> None:
    values: list[Any] = [{"a": {"b": [{}] * 100}}, 10**400, "\U0001f600" * 1_000]
    for value in values:
        problem = going_on.call("POST", "/predict", 422, json={"adapter": "films", "inputs": value})
        assert problem["code"] == "invalid_request"


def test_what_is_answered_never_repeats_a_large_input(going_on: Caller) -> None:
    huge = base64.b64encode(b"x" * (1 << 20)).decode()
    response = going_on.http.post(
        "/adapt",
        content=json.dumps({"adapter": huge, "examples": [{"label": huge, "text": "a"}]}),
        headers=JSON,
    )
    assert response.status_code == 422
    assert len(response.content) < 10_000
