"""Over HTTP: a rollback holds, a version comes back with its examples, examples are set aside."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.service_process import Serving
from tests.support.service.client import BLAME, PRAISE, Caller, Json, pictures, reviews

WRONG: list[Json] = [
    {"id": f"wrong{place}", "text": f"{text}, truly", "label": label}
    for label, texts in (("bad", PRAISE[:3]), ("good", BLAME[:3]))
    for place, text in enumerate(texts, 3 * (label == "good"))
]


def told(caller: Caller, number: int = 0, **more: Any) -> Json:
    """One example more, learned."""
    example = {"id": f"more{number}", "text": f"Lovely, and seen {number} times", "label": "good"}
    return caller.adapt("films", [example], **more)


def live(caller: Caller, adapter: str = "films") -> tuple[int | None, bool]:
    """The live version, and whether it is held."""
    found = caller.call("GET", f"/adapters/{adapter}")
    return found["live"], found["rolled_back_at"] is not None


def roll_back(caller: Caller, version: int, adapter: str = "films") -> Json:
    return caller.call("PUT", f"/adapters/{adapter}/aliases/live", json={"version": version})


def listed(caller: Caller, query: str = "", adapter: str = "films") -> list[str]:
    found = caller.call("GET", f"/adapters/{adapter}/examples{query}")["examples"]
    return [one["id"] for one in found]


def spoil(caller: Caller) -> None:
    """Version 1 of right examples, and version 2, which is live, of wrong ones beside them."""
    caller.adapt("films", reviews())
    assert caller.adapt("films", WRONG, promote="always")["live"]


@pytest.fixture
def spoiled(caller: Caller) -> Caller:
    spoil(caller)
    return caller


def test_the_next_example_does_not_bring_back_what_was_rolled_back(spoiled: Caller) -> None:
    assert roll_back(spoiled, 1)["rolled_back_at"].endswith("Z")
    found = told(spoiled)
    assert (found["version"], found["live"]) == (3, False)
    assert found["report"]["promotion"]["reason"] == "rolled_back"
    assert found["report"]["promotion"]["promoted"] is False
    assert spoiled.predict("films", [{"text": PRAISE[0]}])["version"] == 1
    path = "/adapters/films"
    by_input = spoiled.call("POST", f"{path}/feedback", json={"text": "So so", "label": "bad"})
    relabelled = spoiled.call("PATCH", f"{path}/examples/wrong0", json={"label": "good"})
    moved = spoiled.call("POST", f"{path}/rebase", json={"backbone": "minilm-l6-v2"})
    fewer = spoiled.call("DELETE", f"{path}/examples/wrong1")
    for answer in (by_input, relabelled, moved, fewer):
        assert answer["report"]["promotion"]["reason"] == "rolled_back"
    # The answer names the versions that learned from the erased example; others stay.
    assert fewer["gone"] == [2, 3, 4, 5, 6]
    assert live(spoiled) == (1, True)


def test_a_person_lifts_it_by_promoting(spoiled: Caller) -> None:
    roll_back(spoiled, 1)
    for number in range(2):
        told(spoiled, number)
    # The examples of version 3 were judged, also if newer ones exist.
    assert roll_back(spoiled, 3)["rolled_back_at"] is None
    found = told(spoiled, 9)
    assert found["report"]["promotion"]["reason"] != "rolled_back"
    roll_back(spoiled, 1)
    assert roll_back(spoiled, 5)["rolled_back_at"] is None, "the newest"
    assert live(spoiled) == (5, False)


def test_a_person_lifts_it_by_always(spoiled: Caller) -> None:
    roll_back(spoiled, 1)
    assert told(spoiled, promote="never")["report"]["promotion"]["reason"] == "never"
    assert told(spoiled, promote="always")["live"]
    assert live(spoiled) == (4, False)


def test_if_match_is_of_what_live_points_to(spoiled: Caller) -> None:
    etag = spoiled.http.get("/adapters/films").headers["etag"]
    told(spoiled, promote="always")
    path = "/adapters/films/versions/1/restore"
    assert spoiled.code("POST", path, 412, headers={"If-Match": etag}) == "alias_moved"
    assert live(spoiled) == (3, False)
    etag = spoiled.http.get("/adapters/films").headers["etag"]
    spoiled.call("POST", path, headers={"If-Match": etag})
    assert live(spoiled) == (1, False)


def test_a_restored_version_has_its_examples_again(spoiled: Caller) -> None:
    spoiled.call("PATCH", "/adapters/films/examples/good0", json={"label": "bad"})
    spoiled.call("PATCH", "/adapters/films/examples/good1", json={"excluded": True})
    roll_back(spoiled, 1)
    found = spoiled.call("POST", "/adapters/films/versions/1/restore")
    assert found == {
        "adapter": "films",
        "version": 1,
        "live": True,
        "epoch": found["epoch"],
        "examples": {
            "total": 18,
            "in_use": 12,
            "taken_back": 1,
            "relabelled": 1,
            "set_aside": 6,
            "missing_total": 0,
            "missing": [],
        },
    }
    assert live(spoiled) == (1, False)
    assert listed(spoiled, "?excluded=true") == sorted(one["id"] for one in WRONG)
    assert listed(spoiled, "?excluded=false") == sorted(one["id"] for one in reviews())
    assert len(listed(spoiled)) == 18
    assert spoiled.call("GET", "/adapters/films/examples/good0")["label"] == "good"
    later = told(spoiled)
    assert (later["live"], later["report"]["promotion"]["reason"]) == (True, "not_worse")
    assert later["report"]["per_label"]["good"]["support"] == 7
    back = spoiled.call("PATCH", "/adapters/films/examples/wrong0", json={"excluded": False, "label": "good"})
    assert back["live"]
    assert len(listed(spoiled, "?excluded=true")) == 5


def test_what_cannot_be_restored_says_why(spoiled: Caller) -> None:
    path = "/adapters/films/versions/{}/restore"
    assert spoiled.code("POST", path.format(9), 404) == "unknown_version"
    assert spoiled.code("POST", "/adapters/none/versions/1/restore", 404) == "unknown_adapter"
    assert spoiled.code("POST", path.format(1), 422, json={"version": 1}) == "invalid_request"
    spoiled.call("POST", path.format(1), json={})
    # One of the first version under its id with another input, two as they are.
    new = [{**reviews()[0], "text": "Quite another film"}, *reviews()[2:4]]
    spoiled.adapt("films", new, update="replace")
    partly = spoiled.call("POST", path.format(1))["examples"]
    assert (partly["in_use"], partly["missing_total"], partly["set_aside"]) == (2, 10, 1)
    reasons = {one["id"]: one["reason"] for one in partly["missing"]}
    assert reasons.pop("good0") == "other_input"
    assert set(reasons.values()) == {"not_kept"}
    spoiled.adapt("films", WRONG, update="replace")
    assert spoiled.code("POST", path.format(1), 409) == "examples_gone"
    # An erasure takes the versions that have learned from it.
    spoiled.call("DELETE", "/adapters/films/examples?all=true")
    assert spoiled.code("POST", path.format(5), 404) == "unknown_version"


def test_what_is_set_aside_teaches_nothing(spoiled: Caller) -> None:
    first = spoiled.call("GET", "/adapters/films/versions/1")
    path = "/adapters/films/examples/wrong{}"
    for place in range(6):
        body = {"excluded": True, "fit": place == 5}
        found = spoiled.call("PATCH", path.format(place), json=body)
    assert (found["version"], found["live"], found["examples"]["total"]) == (3, True, 18)
    again = spoiled.call("GET", "/adapters/films/versions/3")
    assert again["sha256"] == first["sha256"]
    assert again["report"]["accuracy"] == first["report"]["accuracy"]
    assert spoiled.call("GET", path.format(0))["excluded"] is True
    # Sent again, it is learned from.
    found = spoiled.adapt("films", WRONG[:1])
    assert (found["examples"]["replaced"], found["examples"]["added"]) == (1, 0)
    assert spoiled.call("GET", path.format(0))["excluded"] is False
    # An excluded example is erased too; versions that did not learn from it stay.
    gone = spoiled.call("DELETE", path.format(1))
    assert gone["gone"] == [2]
    assert live(spoiled)[0] == 5
    spoiled.call("GET", path.format(1), 404)


@pytest.mark.parametrize(
    ("task", "field", "targets", "other"),
    [
        ("classification", "label", ("good", "bad"), "bad"),
        ("multilabel", "labels", (["good"], ["bad"]), ["bad", "good"]),
        ("regression", "target", (1.0, 0.0), 0.25),
    ],
)
def test_examples_of_every_task_are_relabelled_and_set_aside(
    caller: Caller, task: str, field: str, targets: tuple[Any, Any], other: Any
) -> None:
    examples = [
        {"id": one["id"], "text": one["text"], field: targets[place % 2]}
        for place, one in enumerate(reviews())
    ]
    caller.adapt("films", examples, task=task)
    path = "/adapters/films/examples/good0"
    found = caller.call("PATCH", path, json={field: other, "group": "critic 7", "excluded": True})
    assert (found["version"], found["examples"]["replaced"]) == (2, 1)
    one = caller.call("GET", path)
    assert (one[field], one["group"], one["excluded"], one["text"]) == (other, "critic 7", True, PRAISE[0])
    caller.call("PATCH", path, json={"group": "", "excluded": False, "promote": "always"})
    one = caller.call("GET", path)
    assert (one[field], one["group"], one["excluded"]) == (other, None, False)
    assert live(caller) == (3, False)
    back = caller.call("POST", "/adapters/films/versions/1/restore")["examples"]
    assert (back["relabelled"], back["set_aside"], back["in_use"]) == (1, 0, 12)
    assert caller.call("GET", path)[field] == targets[0]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 422, "invalid_request"),
        ({"fit": False}, 422, "invalid_request"),
        ({"label": None, "excluded": None, "group": None}, 422, "invalid_request"),
        ({"excluded": "yes"}, 422, "invalid_request"),
        ({"excluded": 1}, 422, "invalid_request"),
        ({"sampled": False}, 422, "invalid_request"),
        ({"text": "x"}, 422, "invalid_request"),
        ({"label": "good", "labels": ["bad"]}, 422, "label_invalid"),
        ({"target": 1.5}, 422, "label_invalid"),
        ({"label": ""}, 422, "label_missing"),
        ({"label": "g\u200bood"}, 422, "label_collision"),
        ({"group": "a\u0000b"}, 422, "group_invalid"),
        ({"group": "g" * 257}, 422, "group_invalid"),
    ],
)
def test_amendments_that_are_refused_change_nothing(
    caller: Caller, body: Json, status: int, code: str
) -> None:
    caller.adapt("films", reviews(2))
    before = caller.call("GET", "/adapters/films/examples/good0")
    assert caller.code("PATCH", "/adapters/films/examples/good0", status, json=body) == code
    assert caller.call("GET", "/adapters/films/examples/good0") == before
    assert live(caller) == (1, False)


def test_amendments_of_what_is_not_there(caller: Caller) -> None:
    body: Json = {"json": {"excluded": True}}
    assert caller.code("PATCH", "/adapters/films/examples/good0", 404, **body) == "unknown_adapter"
    caller.adapt("films", reviews(2))
    assert caller.code("PATCH", "/adapters/films/examples/none", 404, **body) == "unknown_example"
    as_text = {"content": "excluded", "headers": {"Content-Type": "text/plain"}}
    path = "/adapters/films/examples/good0"
    assert caller.code("PATCH", path, 415, **as_text) == "unsupported_media_type"
    other = Caller(str(caller.http.base_url))
    with other.http:
        assert other.code("PATCH", path, 404, **body) == "unknown_adapter"
        assert other.code("POST", "/adapters/films/versions/1/restore", 404) == "unknown_adapter"


def test_the_last_examples_of_a_label_are_not_set_aside_unless_nothing_is_fitted(caller: Caller) -> None:
    caller.adapt("films", reviews(1))
    path = "/adapters/films/examples/bad0"
    assert caller.code("PATCH", path, 422, json={"excluded": True}) == "one_label"
    assert caller.call("GET", path)["excluded"] is False
    found = caller.call("PATCH", path, json={"excluded": True, "fit": False})
    assert (found["version"], live(caller)) == (None, (1, False))
    caller.call("PATCH", "/adapters/films/examples/good0", json={"excluded": True, "fit": False})
    assert caller.code("POST", "/adapt", 422, json={"adapter": "films"}) == "nothing_to_fit"
    assert caller.call("POST", "/adapters/films/versions/1/restore")["examples"]["taken_back"] == 2


def test_ids_with_slashes_are_amended(caller: Caller) -> None:
    caller.adapt("things", [{**one, "id": f"a/{one['id']} é"} for one in pictures(6)])
    found = caller.call("PATCH", "/adapters/things/examples/a%2Fp3%20%C3%A9", json={"excluded": True})
    assert found["examples"]["replaced"] == 1
    assert listed(caller, "?excluded=true", "things") == ["a/p3 é"]


def test_set_aside_examples_are_listed_page_by_page(caller: Caller) -> None:
    caller.adapt("films", reviews())
    for place in range(5):
        caller.call("PATCH", f"/adapters/films/examples/bad{place}", json={"excluded": True, "fit": False})
    found: list[str] = []
    query = "?excluded=true&limit=2"
    while True:
        page = caller.call("GET", f"/adapters/films/examples{query}")
        found += [one["id"] for one in page["examples"]]
        if page["next"] is None:
            break
        query = f"?excluded=true&limit=2&cursor={page['next']}"
    assert found == [f"bad{place}" for place in range(5)]
    assert caller.code("GET", "/adapters/films/examples?excluded=perhaps", 422) == "invalid_request"


def test_a_key_makes_both_happen_once(spoiled: Caller) -> None:
    def send(method: str, path: str, key: str, **request: Any) -> tuple[bool, bytes]:
        answer = spoiled.http.request(method, path, headers={"Idempotency-Key": key}, **request)
        assert answer.status_code == 200, answer.text
        return "idempotency-replayed" in answer.headers, answer.content

    path, body = "/adapters/films/examples/wrong0", {"json": {"excluded": True}}
    first = send("PATCH", path, "k1", **body)
    assert send("PATCH", path, "k1", **body) == (True, first[1])
    assert json.loads(first[1])["version"] == 3
    path = "/adapters/films/versions/1/restore"
    first = send("POST", path, "k2")
    told(spoiled)
    assert send("POST", path, "k2") == (True, first[1])
    assert live(spoiled) == (4, False)
    assert send("POST", path, "k3")[0] is False
    assert live(spoiled) == (1, False)


def test_tunes_and_uploads_go_by_it_too(caller: Caller) -> None:
    """Only examples in use count for a fine-tune; what an upload teaches is withheld as well."""
    lines = [
        {"id": f"u{place}", "text": f"{text}, part {place}", "label": label}
        for place in range(26)
        for label, text in (("good", PRAISE[place % 6]), ("bad", BLAME[place % 6]))
        for place in [2 * place + (label == "bad")]
    ]
    caller.adapt("films", lines)
    tune: Json = {"json": {"adapter": "films", "method": "fine_tune", "fine_tune": {"epochs": 1}}}
    for place in range(3):
        caller.call("PATCH", f"/adapters/films/examples/u{place}", json={"excluded": True, "fit": False})
    assert caller.code("POST", "/adapt", 422, **tune) == "too_few_examples"
    told(caller)
    roll_back(caller, 1)
    upload = b"".join(json.dumps({**one, "id": f"v{one['id']}"}).encode() + b"\n" for one in lines[:6])
    headers = {"Content-Type": "application/x-ndjson"}
    job = caller.call("POST", "/adapt?adapter=films", 202, content=upload, headers=headers)["id"]
    end = time.monotonic() + 120
    while (found := caller.call("GET", f"/jobs/{job}"))["finished_at"] is None:
        assert time.monotonic() < end
        time.sleep(0.2)
    assert found["state"] == "succeeded"
    made = caller.call("GET", f"/adapters/films/versions/{found['version']}")
    assert made["report"]["promotion"]["reason"] == "rolled_back"
    assert live(caller) == (1, True)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, Serving]]:
    """Two services over one database and one store."""
    folder: Path = tmp_path_factory.mktemp("two")
    shared = {
        "TOPWORK_BACKBONES": "minilm-l6-v2",
        "TOPWORK_WORKERS": "0",
        "TOPWORK_DATABASE_URL": f"sqlite:///{folder / 'shared.db'}",
        "TOPWORK_STORE_URL": str(folder / "artifacts"),
    }
    with (
        Serving(folder / "one", environment=shared) as one,
        Serving(folder / "other", environment=shared) as other,
    ):
        yield one, other


def test_another_process_knows_it_too(two: tuple[Serving, Serving]) -> None:
    here, there = (Caller(one.url, "shared") for one in two)
    with here.http, there.http:
        spoil(here)
        inputs = [{"text": PRAISE[0]}]
        assert there.predict("films", inputs)["version"] == 2
        epoch = roll_back(here, 1)["epoch"]
        assert there.predict("films", inputs, min_epoch=epoch)["version"] == 1
        assert told(there)["report"]["promotion"]["reason"] == "rolled_back"
        assert told(there, 1, promote="always")["live"]
        epoch = here.call("POST", "/adapters/films/versions/1/restore")["epoch"]
        assert there.predict("films", inputs, min_epoch=epoch)["version"] == 1
        assert len(listed(there, "?excluded=true")) == 8
        found = told(there, 2)
        assert (found["live"], found["report"]["per_label"]["good"]["support"]) == (True, 7)
