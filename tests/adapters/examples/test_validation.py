"""Validation of posted examples: those kept, their ids, and the reasons for the others."""

from __future__ import annotations

import pytest

from adapters.examples.target import ExampleError, Task, input_digest
from adapters.examples.validation import MixedInputs, PostedExample, admit, common_kind
from models.preprocess.limits import InputError
from models.spec import Kind


def codes(
    posted: list[PostedExample], task: Task = "classification", kind: Kind = "text", known: str = ""
) -> list[str]:
    admitted, rejected = admit(posted, task=task, kind=kind, known_labels=known.split())
    found = {one.index: one.code for one in rejected} | {one.index: "" for one in admitted}
    return [found.get(index, "merged") for index in range(len(posted))]


def test_an_example_without_an_id_is_named_by_its_input() -> None:
    (example,), _ = admit([PostedExample("hello", "a")], task="classification", kind="text", known_labels=())
    assert example.id == example.digest == input_digest("hello")


def test_bad_examples_are_rejected_where_they_stand() -> None:
    posted = [
        PostedExample("good", "a"),
        PostedExample("no label"),
        PostedExample(b"\x89PNG", "a"),
        PostedExample(InputError("invalid_base64", "…"), "a"),
        PostedExample("long label", "x" * 65_536),
        PostedExample("id", "a", id=""),
        PostedExample("id", "a", id="with\0nul"),
        PostedExample("id", "a", id="x" * 257),
        PostedExample("two", ExampleError("label_invalid", "…")),
        PostedExample("number", 5),
    ]
    assert codes(posted) == [
        "",
        "label_missing",
        "wrong_kind",
        "invalid_base64",
        "label_too_long",
        "id_invalid",
        "id_invalid",
        "id_invalid",
        "label_invalid",
        "label_invalid",
    ]


def test_one_id_with_two_labels_is_rejected_wherever_it_stands() -> None:
    posted = [PostedExample("x", "a", "1"), PostedExample("y", "b", "2"), PostedExample("x", "c", "1")]
    assert codes(posted) == ["conflicting_labels", "", "conflicting_labels"]


def test_one_input_without_ids_with_two_labels_conflicts_too() -> None:
    assert codes([PostedExample("x", "a"), PostedExample("x", "b")]) == ["conflicting_labels"] * 2


def test_one_id_with_two_inputs_is_rejected() -> None:
    assert codes([PostedExample("x", "a", "1"), PostedExample("y", "a", "1")]) == ["conflicting_inputs"] * 2


def test_the_same_example_twice_is_one() -> None:
    assert codes([PostedExample("x", "a", "1"), PostedExample("x", "a", "1")]) == ["", "merged"]


def test_one_input_under_two_ids_may_have_two_labels() -> None:
    assert codes([PostedExample("x", "a", "1"), PostedExample("x", "b", "2")]) == ["", ""]


def test_labels_equal_after_canonical_normalisation_are_one() -> None:
    posted = [
        PostedExample("x", "caf\u00e9"),
        PostedExample("y", "cafe\u0301"),
        PostedExample("z", "  café "),
    ]
    admitted, rejected = admit(posted, task="classification", kind="text", known_labels=())
    assert not rejected
    assert {one.target for one in admitted} == {"caf\u00e9"}


@pytest.mark.parametrize("label", ["\ufb01sh", "f\u200bish", "\uff46\uff49\uff53\uff48", "fi\u00adsh"])
def test_a_label_that_only_looks_like_another_is_rejected(label: str) -> None:
    assert codes([PostedExample("x", "fish"), PostedExample("y", label)]) == ["", "label_collision"]
    assert codes([PostedExample("y", label)], known="fish") == ["label_collision"]
    assert codes([PostedExample("y", label), PostedExample("x", "fish")]) == ["", "label_collision"]


def test_case_makes_another_label() -> None:
    assert codes([PostedExample("x", "A"), PostedExample("y", "a")]) == ["", ""]


def test_labels_of_one_example_collide_too() -> None:
    posted = [
        PostedExample("x", ["fish", "\ufb01sh"]),
        PostedExample("y", ["fish", "fish"]),
        PostedExample("z", []),
    ]
    assert codes(posted, task="multilabel") == ["label_collision", "", ""]


@pytest.mark.parametrize("target", [float("nan"), float("inf"), True, "1.5", None])
def test_a_regression_wants_a_finite_number(target: object) -> None:
    assert codes(
        [PostedExample("x", target), PostedExample("y", 3), PostedExample("z", -1.5)], task="regression"
    )[1:] == ["", ""]
    assert codes([PostedExample("x", target)], task="regression")[0].startswith("target_")


def test_the_kind_of_mixed_inputs_cannot_be_told() -> None:
    assert common_kind(["a", "b", InputError("x", "y")]) == "text"
    assert common_kind([b"a"]) == "image"
    assert common_kind([]) is None
    with pytest.raises(MixedInputs):
        common_kind(["a", b"b"])


@pytest.mark.parametrize("group", ["", "x" * 257, "a\0b", "a\nb", "\ud83d"])
def test_a_group_that_is_no_name_is_rejected(group: str) -> None:
    assert codes([PostedExample("x", "a", group=group), PostedExample("y", "b", group="customer 1")]) == [
        "group_invalid",
        "",
    ]


def test_group_and_sampled_come_along() -> None:
    posted = [PostedExample("x", "a", group="g", sampled=False), PostedExample("y", "b")]
    admitted, _ = admit(posted, task="classification", kind="text", known_labels=())
    assert [(one.group, one.sampled) for one in admitted] == [("g", False), (None, True)]


def test_one_id_with_two_groups_is_rejected() -> None:
    assert (
        codes([PostedExample("x", "a", group="1"), PostedExample("x", "a", group="2")])
        == ["conflicting_groups"] * 2
    )
    assert (
        codes([PostedExample("x", "a", sampled=False), PostedExample("x", "a")]) == ["conflicting_groups"] * 2
    )
    assert codes([PostedExample("x", "a", group="1"), PostedExample("x", "a", group="1")]) == ["", "merged"]
