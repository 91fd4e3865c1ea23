"""Labels, targets, digests and folds."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.examples.target import ExampleError, input_digest, normalise_label, normalise_target
from adapters.probe.folds import folds


def test_labels_that_look_the_same_are_one() -> None:
    assert normalise_label("cafe\u0301") == normalise_label(" caf\u00e9 ") == "caf\u00e9"


@pytest.mark.parametrize(
    ("label", "code"),
    [
        ("", "label_missing"),
        ("  ", "label_missing"),
        ("a\nb", "label_invalid"),
        ("a\x00b", "label_invalid"),
        ("\ud800", "label_invalid"),
        (3, "label_invalid"),
        (None, "label_invalid"),
        ("x" * 257, "label_too_long"),
        ("x" * 65536, "label_too_long"),
    ],
)
def test_refuses_what_is_no_label(label: object, code: str) -> None:
    with pytest.raises(ExampleError) as refused:
        normalise_label(label)
    assert refused.value.code == code


@pytest.mark.parametrize("target", [float("nan"), float("inf"), -float("inf"), 1e31, 10**400])
def test_refuses_targets_that_are_not_finite(target: float) -> None:
    with pytest.raises(ExampleError) as refused:
        normalise_target("regression", target)
    assert refused.value.code == "target_not_finite"


def test_a_truth_value_is_no_number_and_a_text_no_list() -> None:
    for task, target in (("regression", True), ("multilabel", "abc")):
        with pytest.raises(ExampleError):
            normalise_target(task, target)  # type: ignore[arg-type]


def test_multilabel_targets_are_sorted_and_distinct() -> None:
    assert normalise_target("multilabel", ["b", "a", " b"]) == ("a", "b")
    assert normalise_target("multilabel", []) == ()


def test_digests_of_equal_texts_are_equal() -> None:
    assert input_digest("cafe\u0301") == input_digest("caf\u00e9")
    assert input_digest("a") != input_digest("b")
    assert input_digest(b"a") == input_digest("a")


pairs = st.lists(
    st.tuples(st.integers(0, 30).map(lambda number: f"{number:04x}"), st.sampled_from(["a", "b", "c", "d"])),
    min_size=2,
    max_size=60,
)


@settings(deadline=None)
@given(pairs=pairs, k=st.integers(2, 10), seed=st.integers(0, 100))
def test_folds_depend_on_the_examples_and_not_on_their_order(
    pairs: list[tuple[str, str]], k: int, seed: int
) -> None:
    digests, targets = [digest for digest, _ in pairs], [target for _, target in pairs]
    dealt = folds(digests, targets, k)
    order = np.random.default_rng(seed).permutation(len(pairs))
    again = folds([digests[row] for row in order], [targets[row] for row in order], k)
    assert np.array_equal(dealt[order], again)


@settings(deadline=None)
@given(pairs=pairs, k=st.integers(2, 10))
def test_equal_inputs_share_a_fold_and_no_label_is_held_out_whole(
    pairs: list[tuple[str, str]], k: int
) -> None:
    dealt = folds([digest for digest, _ in pairs], [target for _, target in pairs], k)
    assert ((dealt >= -1) & (dealt < k)).all()
    fold_of = defaultdict(set)
    for (digest, _), fold in zip(pairs, dealt.tolist(), strict=True):
        fold_of[digest].add(fold)
    assert all(len(found) == 1 for found in fold_of.values())


def test_folds_are_stratified() -> None:
    targets = ["a"] * 50 + ["b"] * 25 + ["c"] * 10
    dealt = folds([f"{row:04x}" for row in range(85)], targets, 5)
    for label, size in Counter(targets).items():
        own = dealt[[target == label for target in targets]]
        assert np.bincount(own, minlength=5).tolist() == [size // 5] * 5


def test_the_only_holder_of_a_label_is_held_out_for_its_other_labels() -> None:
    targets = [("a",), ("a", "b"), ("a",), (), ("c",), ("a",)]
    digests = [f"{row:04x}" for row in range(6)]
    assert sorted(folds(digests, targets, 3).tolist()) == [0, 0, 1, 1, 2, 2]
    single = ["a", "b", "a", "a", "c", "a"]
    assert (folds(digests, single, 3) == -1).tolist() == [label in "bc" for label in single]
