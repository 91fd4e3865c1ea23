"""Examples, versions, the live alias, feedback and rebase over HTTP."""

from __future__ import annotations

import base64

import pytest

from tests.support.service.client import BLAME, PRAISE, Caller, pictures, reviews


def test_examples_are_listed_page_by_page(caller: Caller) -> None:
    caller.adapt("films", reviews())
    listed: list[str] = []
    query = "?limit=5"
    while True:
        page = caller.call("GET", f"/adapters/films/examples{query}")
        listed += [one["id"] for one in page["examples"]]
        if page["next"] is None:
            break
        query = f"?limit=5&cursor={page['next']}"
    assert listed == sorted(one["id"] for one in reviews())
    assert page["examples"][0].keys() == {
        "id",
        "label",
        "group",
        "sampled",
        "excluded",
        "digest",
        "created_at",
    }
    for cursor in ("%ff", "abc*", "Pz8_" * 600, "gICA"):
        caller.call("GET", f"/adapters/films/examples?cursor={cursor}", 422)
    caller.call("GET", "/adapters/films/examples?limit=0", 422)


def test_an_example_is_shown_with_its_input(caller: Caller) -> None:
    caller.adapt("films", [{**reviews(1)[0], "id": "a/b c?é"}, reviews(1)[1]])
    found = caller.call("GET", "/adapters/films/examples/a%2Fb%20c%3F%C3%A9")
    assert (found["id"], found["text"], found["label"]) == ("a/b c?é", PRAISE[0], "good")
    caller.adapt("things", pictures(6))
    image = caller.call("GET", "/adapters/things/examples/p3")["image"]
    assert image == pictures(6)[3]["image"]
    assert base64.b64decode(image)


def test_removing_refits_and_takes_the_versions_along(caller: Caller) -> None:
    caller.adapt("films", reviews(4))
    caller.adapt("films", [{"id": "odd", "text": "odd one", "label": "bad"}])
    found = caller.call("DELETE", "/adapters/films/examples/odd")
    assert (found["version"], found["live"], found["gone"]) == (3, True, [2])
    assert (found["examples"]["total"], found["examples"]["removed"]) == (8, 1)
    assert [one["version"] for one in caller.call("GET", "/adapters/films/versions")["versions"]] == [3, 1]
    caller.call("GET", "/adapters/films/examples/odd", 404)
    # Erased from the file that it shared with others.
    found = caller.call("DELETE", "/adapters/films/examples/good0")
    assert sorted(found["gone"]) == [1, 3]
    assert (
        caller.predict("films", [{"text": PRAISE[1]}], explain=9)["predictions"][0]["nearest"][0]["id"]
        == "good1"
    )
    assert caller.call("GET", "/adapters/films/examples/good1")["text"] == PRAISE[1]


def test_removing_until_nothing_can_be_fitted(caller: Caller) -> None:
    caller.adapt("films", reviews(2))
    found = caller.call("DELETE", "/adapters/films/examples", params=[("id", "bad0"), ("id", "bad1")])
    assert (found["version"], found["live"]) == (None, False)
    assert found["examples"]["total"] == 2
    assert caller.call("GET", "/adapters/films")["live"] is None
    body = {"adapter": "films", "inputs": [{"text": "x"}]}
    assert caller.code("POST", "/predict", 409, json=body) == "no_live_version"
    found = caller.adapt("films", reviews(2)[1:2])
    assert (found["version"], found["live"]) == (2, True)


def test_removing_all(caller: Caller) -> None:
    caller.adapt("films", reviews(2))
    assert caller.code("DELETE", "/adapters/films/examples", 422) == "invalid_request"
    assert caller.code("DELETE", "/adapters/films/examples?id=bad0&all=true", 422) == "invalid_request"
    found = caller.call("DELETE", "/adapters/films/examples?all=true")
    assert found["examples"]["total"] == 0
    assert caller.call("GET", "/adapters/films/versions")["versions"] == []
    assert caller.code("POST", "/adapt", 422, json={"adapter": "films"}) == "nothing_to_fit"


def test_rolling_back_and_forth(caller: Caller) -> None:
    caller.adapt("films", reviews(3))
    caller.adapt("films", reviews(6))
    response = caller.http.get("/adapters/films")
    etag = response.headers["etag"]
    body = {"version": 1}
    moved = caller.http.put("/adapters/films/aliases/live", json=body, headers={"If-Match": etag})
    assert moved.status_code == 200
    assert moved.json()["live"] == 1
    assert moved.headers["etag"] != etag
    assert caller.predict("films", [{"text": "x"}])["version"] == 1
    again = {"json": {"version": 2}, "headers": {"If-Match": etag}}
    assert caller.code("PUT", "/adapters/films/aliases/live", 412, **again) == "alias_moved"
    caller.call("PUT", "/adapters/films/aliases/live", json={"version": 2}, headers={"If-Match": "*"})
    caller.call("PUT", "/adapters/films/aliases/live", json={"version": 1})
    assert caller.predict("films", [{"text": "x"}])["version"] == 1
    for wrong in ({}, {"version": 0}, {"version": "1"}, {"version": 2**31}, {"version": True}):
        caller.call("PUT", "/adapters/films/aliases/live", 422, json=wrong)


def test_versions_have_their_reports(caller: Caller) -> None:
    first = caller.adapt("films", reviews())
    found = caller.call("GET", "/adapters/films/versions/1")
    assert found["report"] == first["report"]
    assert (found["version"], found["live"], found["method"], found["labels"]) == (1, True, "linear_probe", 2)
    assert caller.call("GET", "/adapters/films/versions")["versions"] == [found]


def test_twenty_versions_are_kept(caller: Caller) -> None:
    for _ in range(23):
        caller.adapt("films", reviews(1), promote="never")
    kept = [one["version"] for one in caller.call("GET", "/adapters/films/versions")["versions"]]
    assert kept == list(range(23, 3, -1))


def test_feedback_on_a_new_input_becomes_an_example(caller: Caller) -> None:
    caller.adapt("films", reviews())
    found = caller.call("POST", "/adapters/films/feedback", json={"text": "So so", "label": "bad"})
    assert (found["version"], found["examples"]["added"]) == (2, 1)


def test_feedback_corrects_an_example_by_its_id(caller: Caller) -> None:
    caller.adapt("films", reviews())
    found = caller.call("POST", "/adapters/films/feedback", json={"id": "good0", "label": "bad"})
    assert (found["examples"]["added"], found["examples"]["replaced"]) == (0, 1)
    assert found["report"]["promotion"]["reason"] == "example_corrected"
    assert found["live"]
    one = caller.call("GET", "/adapters/films/examples/good0")
    assert (one["label"], one["text"]) == ("bad", PRAISE[0])


def test_feedback_on_a_known_input_corrects_it_under_its_own_id(caller: Caller) -> None:
    caller.adapt("films", reviews())
    found = caller.call("POST", "/adapters/films/feedback", json={"text": PRAISE[1], "label": "bad"})
    assert (found["examples"]["total"], found["examples"]["replaced"]) == (12, 1)
    assert caller.call("GET", "/adapters/films/examples/good1")["label"] == "bad"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"id": "none", "label": "bad"}, 404, "unknown_example"),
        ({"id": "good0", "text": "x", "label": "bad"}, 422, "invalid_request"),
        ({"label": "bad"}, 422, "invalid_request"),
        ({"text": "x"}, 422, "label_missing"),
        ({"id": "good0", "target": 5}, 422, "label_invalid"),
        ({"text": "", "label": "bad"}, 422, "empty_text"),
        ({"image": "AAAA", "label": "bad"}, 422, "wrong_kind"),
        ({"text": "x", "label": "b\u200bad"}, 422, "label_collision"),
        ({"id": "good0", "label": "b\u200bad"}, 422, "label_collision"),
    ],
)
def test_feedback_that_cannot_be_used(
    caller: Caller, body: dict[str, object], status: int, code: str
) -> None:
    caller.adapt("films", reviews(1))
    assert caller.code("POST", "/adapters/films/feedback", status, json=body) == code
    assert (
        caller.code("POST", "/adapters/none/feedback", 404, json={"text": "x", "label": "y"})
        == "unknown_adapter"
    )
    assert caller.call("GET", "/adapters/films")["examples"] == 2


def test_a_rebase_embeds_again_and_fits(caller: Caller) -> None:
    before = caller.adapt("films", reviews())
    found = caller.call("POST", "/adapters/films/rebase", json={"backbone": "minilm-l6-v2"})
    assert (found["version"], found["live"], found["examples"]["total"]) == (2, True, 12)
    assert found["report"]["accuracy"] == before["report"]["accuracy"]
    assert found["report"]["promotion"]["compared"] == 12
    assert (
        caller.predict("films", [{"text": BLAME[0]}], explain=1)["predictions"][0]["nearest"][0]["id"]
        == "bad0"
    )
    assert caller.adapt("films", [{"text": "More", "label": "good"}])["version"] == 3
    assert (
        caller.code("POST", "/adapters/none/rebase", 404, json={"backbone": "minilm-l6-v2"})
        == "unknown_adapter"
    )


def test_adapters_are_listed_page_by_page(caller: Caller) -> None:
    for name in ("c", "a", "b"):
        caller.adapt(name, reviews(1), fit=False)
    first = caller.call("GET", "/adapters?limit=2")
    assert [one["adapter"] for one in first["adapters"]] == ["a", "b"]
    second = caller.call("GET", f"/adapters?limit=2&cursor={first['next']}")
    assert [one["adapter"] for one in second["adapters"]] == ["c"]
    assert second["next"] is None


def test_many_corrections_one_at_a_time_leave_few_files_to_read(caller: Caller) -> None:
    caller.adapt("films", reviews(2))
    for index in range(40):
        body = {"text": f"Film number {index} was fine", "label": "good", "fit": index == 39}
        found = caller.call("POST", "/adapters/films/feedback", json=body)
    assert (found["examples"]["total"], found["version"]) == (44, 2)
    assert caller.call("GET", "/adapters/films/examples/bad1")["text"] == BLAME[1]
    nearest = caller.predict("films", [{"text": "Film number 7 was fine"}], explain=1)["predictions"][0][
        "nearest"
    ][0]
    assert nearest["similarity"] == pytest.approx(1, abs=1e-4)


def test_feedback_is_not_measured_on_unless_it_says_so(caller: Caller) -> None:
    caller.adapt("films", [{**one, "group": "first"} for one in reviews()])
    path = "/adapters/films/feedback"
    caller.call("POST", path, json={"text": "Slow and grey", "label": "bad", "group": "critic 7"})
    caller.call("POST", path, json={"text": "Light and quick", "label": "good", "sampled": True})
    caller.call("POST", path, json={"text": PRAISE[1], "label": "bad", "group": "another"})
    caller.call("POST", path, json={"id": "good0", "label": "bad"})
    page = caller.call("GET", "/adapters/films/examples")["examples"]
    found = {one["id"]: (one["label"], one["group"], one["sampled"]) for one in page}
    assert (found["good0"], found["good1"]) == (("bad", "first", True), ("bad", "first", True))
    added = [value for name, value in found.items() if len(name) == 64]
    assert sorted(added, key=str) == [("bad", "critic 7", False), ("good", None, True)]
    body = {"text": "Odd", "label": "bad", "group": ""}
    assert caller.code("POST", path, 422, json=body) == "group_invalid"
