"""Promotion: exact tests, and the cases in which there is nothing to compare."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import binomtest

from adapters.example import Target, Task
from adapters.promotion import decide, decide_late, loss_p_value
from adapters.segments import Evidence


def evidence(scores: Sequence[float], targets: Sequence[Target] | None = None, ids: str = "") -> Evidence:
    count = len(scores)
    names = tuple(ids) if ids else tuple(f"e{index:03}" for index in range(count))
    chosen = tuple(targets) if targets is not None else tuple("ab"[index % 2] for index in range(count))
    return Evidence(names, tuple(f"{name:0>64}" for name in names), chosen, np.array(scores, np.float32))


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (0, 5), (5, 0), (3, 9), (400, 460), (1000, 1000)])
def test_p_value_is_the_binomial_tail(wins: int, losses: int) -> None:
    if not wins + losses:
        assert loss_p_value(wins, losses) == 1.0
        return
    expected = binomtest(losses, wins + losses, 0.5, alternative="greater").pvalue
    assert loss_p_value(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_p_value_of_many_tosses_is_close() -> None:
    expected = binomtest(1_100, 2_100, 0.5, alternative="greater").pvalue
    assert loss_p_value(1_000, 1_100) == pytest.approx(expected, rel=0.02)


def test_a_significantly_worse_version_is_withheld() -> None:
    live, new = evidence([1.0] * 40), evidence([0.0] * 8 + [1.0] * 32)
    decision = decide("if_better", "classification", new, live)
    assert not decision.promote
    assert decision.reason == "worse"
    assert (decision.compared, decision.score, decision.live_score) == (40, 0.8, 1.0)
    assert decision.p_value == pytest.approx(0.5**8)


def test_a_version_that_may_be_as_good_is_promoted() -> None:
    live, new = evidence([1.0] * 40), evidence([0.0] * 4 + [1.0] * 36)
    decision = decide("if_better", "classification", new, live)
    assert decision.promote
    assert decision.reason == "not_worse"


def test_always_and_never_are_what_they_say() -> None:
    live, new = evidence([1.0] * 40), evidence([0.0] * 40)
    always = decide("always", "classification", new, live)
    assert always.promote
    assert always.score == 0.0
    assert not decide("never", "classification", live, new).promote
    assert not decide("never", "classification", new, None).promote


def test_the_first_version_is_promoted() -> None:
    assert decide("if_better", "classification", evidence([0.0, 0.0]), None).promote


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        (evidence([0.0] * 10, ["a", "b"] * 4 + ["a", "c"]), "label_added"),
        (evidence([0.0] * 9, (["a", "b"] * 5)[:9]), "example_removed"),
        (evidence([0.0] * 10, ["b", "b"] + ["a", "b"] * 4), "example_corrected"),
    ],
)
def test_another_question_promotes_whatever_the_score(new: Evidence, reason: str) -> None:
    decision = decide("if_better", "classification", new, evidence([1.0] * 10))
    assert decision.promote
    assert decision.reason == reason


def test_an_example_with_another_input_was_corrected() -> None:
    live = evidence([1.0] * 10)
    new = Evidence(live.ids, ("f" * 64, *live.digests[1:]), live.targets, np.zeros(10, np.float32))
    assert decide("if_better", "classification", new, live).reason == "example_corrected"


def test_only_examples_that_both_have_and_scored_are_compared() -> None:
    live = evidence([1.0] * 10)
    new = evidence([np.nan] * 3 + [1.0] * 7 + [0.0] * 30)
    decision = decide("if_better", "classification", new, live)
    assert decision.promote
    assert decision.compared == 7
    assert decision.to_json()["compared"] == 7


def test_without_scores_there_is_nothing_to_hold_against_it() -> None:
    decision = decide("if_better", "classification", evidence([np.nan] * 4), evidence([1.0] * 4))
    assert decision.promote
    assert decision.reason == "not_comparable"
    assert decision.to_json()["p_value"] is None


@pytest.mark.parametrize("task", ["regression", "multilabel"])
def test_other_tasks_are_compared_example_by_example(task: Task) -> None:
    targets: list[Target] = [1.0] * 20 if task == "regression" else [("a",)] * 20
    live, worse = evidence([-0.1] * 20, targets), evidence([-0.2] * 20, targets)
    assert not decide("if_better", task, worse, live).promote
    assert decide("if_better", task, live, worse).promote


def test_a_regression_with_the_better_mean_is_promoted() -> None:
    targets: list[Target] = [1.0] * 20
    live, new = evidence([-0.1] * 18 + [-9.0] * 2, targets), evidence([-0.11] * 18 + [-0.1] * 2, targets)
    decision = decide("if_better", "regression", new, live)
    assert decision.p_value is not None
    assert decision.p_value < 0.05
    assert decision.promote


def test_a_fine_tune_has_to_be_better() -> None:
    live = evidence([1.0] * 9 + [0.0])
    for scores, promoted, reason in (
        ([1.0] * 10, True, "better"),
        ([0.0] + [1.0] * 8 + [1.0], False, "not_better"),
        ([0.0] + [1.0] * 8 + [0.0], False, "not_better"),
        ([np.nan] * 10, False, "not_comparable"),
    ):
        decision = decide_late("if_better", "classification", evidence(scores), live)
        assert (decision.promote, decision.reason) == (promoted, reason)
    assert decide_late("if_better", "classification", evidence([0.0]), None).reason == "first"
    assert decide_late("always", "classification", evidence([0.0] * 10), live).promote
    assert not decide_late("never", "classification", evidence([1.0] * 10), live).promote


def test_examples_that_came_while_it_trained_do_not_speak_for_a_fine_tune() -> None:
    tuned = evidence([0.0] * 10)
    more = decide_late("if_better", "classification", tuned, evidence([1.0] * 12))
    assert (more.promote, more.reason, more.compared) == (False, "not_better", 10)
    corrected = evidence([1.0] * 10, ["b", "b"] + ["a", "b"] * 4)
    found = decide_late("if_better", "classification", tuned, corrected)
    assert (found.promote, found.reason, found.compared) == (False, "not_better", 9)


def test_a_fine_tune_without_a_label_that_answers_now_is_withheld() -> None:
    live = evidence([0.0] * 11, ["a", "b"] * 5 + ["c"])
    decision = decide_late("if_better", "classification", evidence([1.0] * 10), live)
    assert (decision.promote, decision.reason) == (False, "label_missing")
