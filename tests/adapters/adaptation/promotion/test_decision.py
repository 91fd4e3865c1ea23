"""Promotion: exact tests, and the cases in which there is nothing to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from adapters.adaptation.promotion.comparison import Comparison, loss_p_value
from adapters.adaptation.promotion.decision import best_of, decide, decide_late, remember, unlearned
from adapters.examples.target import Target, Task
from adapters.storage.formats import Evidence, History


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
    live, new = evidence([1.0] * 60), evidence([0.0] * 12 + [1.0] * 48)
    decision = decide("if_better", "classification", new, live)
    assert not decision.promote
    assert decision.reason == "worse"
    assert decision.with_live == Comparison(60, 0.8, 1.0, 0.5**12)


def test_nothing_but_always_goes_past_a_rollback() -> None:
    live, better = evidence([0.0] * 30 + [1.0] * 30), evidence([1.0] * 60)
    for choose in (decide, decide_late):
        assert choose("if_better", "classification", better, live).promote
        held = choose("if_better", "classification", better, live, held=True)
        assert (held.promote, held.reason, held.fallback) == (False, "rolled_back", None)
        assert held.with_live.compared == 60, "how good it is, it says all the same"
        lost = choose("if_better", "classification", better, None, held=True)
        assert (lost.promote, lost.reason) == (False, "rolled_back")
        assert choose("always", "classification", better, live, held=True).promote
        assert choose("never", "classification", better, live, held=True).reason == "never"


def test_a_held_version_is_not_moved_back_by_doubt() -> None:
    live, doubted = evidence([1.0] * 40), heard([1.0] * 10 + [0.0] * 30, 0.9, [3] * 40)
    assert decide("if_better", "classification", doubted, live).fallback == 3
    held = decide("if_better", "classification", doubted, live, held=True)
    assert (held.reason, held.fallback) == ("rolled_back", None)


def test_a_version_that_may_be_as_good_is_promoted() -> None:
    live, new = evidence([1.0] * 40), evidence([0.0] * 4 + [1.0] * 36)
    decision = decide("if_better", "classification", new, live)
    assert decision.promote
    assert decision.reason == "not_worse"


def test_always_and_never_are_what_they_say() -> None:
    live, new = evidence([1.0] * 40), evidence([0.0] * 40)
    always = decide("always", "classification", new, live)
    assert always.promote
    assert always.with_live.score == 0.0
    assert not always.proved
    assert not decide("never", "classification", live, new).promote
    assert not decide("never", "classification", new, None).promote


def test_the_first_version_is_promoted() -> None:
    assert decide("if_better", "classification", evidence([0.0, 0.0]), None).promote


CHANGES: list[tuple[Sequence[Target], str]] = [
    ([*"ab" * 29, "a", "c"], "label_added"),
    ([*"ab" * 29, "a"], "example_removed"),
    (["b", "b", *"ab" * 29], "example_corrected"),
]


@pytest.mark.parametrize(("targets", "reason"), CHANGES)
def test_a_change_is_the_reason_where_nothing_speaks_against_it(
    targets: Sequence[Target], reason: str
) -> None:
    new = evidence([1.0] * len(targets), targets)
    decision = decide("if_better", "classification", new, evidence([1.0] * 60))
    assert (decision.promote, decision.reason) == (True, reason)


@pytest.mark.parametrize(("targets", "reason"), CHANGES)
def test_no_change_lets_through_what_is_worse_on_the_rest(targets: Sequence[Target], reason: str) -> None:
    new = evidence([0.0] * len(targets), targets)
    decision = decide("if_better", "classification", new, evidence([1.0] * 60))
    assert (decision.promote, decision.reason) == (False, "worse")


def test_a_rare_label_that_sinks_is_seen() -> None:
    targets = ["rare"] * 20 + ["common"] * 400
    live = evidence([1.0] * 16 + [0.0] * 4 + [1.0] * 300 + [0.0] * 100, targets)
    # Sixteen of the rare ones are lost, and as many of the common ones won.
    new = evidence([0.0] * 20 + [1.0] * 320 + [0.0] * 80, targets)
    decision = decide("if_better", "classification", new, live)
    assert (decision.promote, decision.reason) == (False, "worse_labels")
    assert decision.to_json()["worse_labels"] == ["rare"]


def test_many_small_steps_down_are_seen_from_the_best() -> None:
    """Each version loses three examples of two hundred, which no test against the one before can see."""
    live, number = evidence([1.0] * 200), 1
    for lost in range(3, 31, 3):
        new = remember(evidence([0.0] * lost + [1.0] * (200 - lost)), live, number, (), None)
        decision = decide("if_better", "classification", new, live)
        assert not decision.with_live.worse(0.05)
        assert decision.best == 1
        if not decision.promote:
            break
        live, number = new, number + 1
    assert (lost, decision.reason) == (12, "worse")
    assert decision.to_json()["best"]["best_score"] == 1.0


def test_a_better_version_becomes_the_best() -> None:
    live = remember(evidence([1.0] * 30 + [0.0] * 10), evidence([1.0] * 20 + [0.0] * 20), 1, (), None)
    assert best_of(live, 2) == (2, live)
    new = remember(evidence([1.0] * 40), live, 2, (), None)
    assert new.history is not None
    assert (new.history.best, new.history.best_scores.sum()) == (2, 30.0)


def heard(agreed: Sequence[float], expected: float, asked: Sequence[int]) -> Evidence:
    """Evidence of examples that a version was asked about, and of as many others that all got right."""
    count = len(agreed)
    nothing = [np.nan] * count
    history = History(
        np.array([*agreed, *nothing], np.float32),
        np.array([expected] * count + nothing, np.float32),
        np.array([*asked, *[0] * count], np.int64),
        1,
        np.full(2 * count, np.nan, np.float32),
    )
    return replace(evidence([1.0] * 2 * count), history=history)


def test_new_examples_that_disagree_are_not_learned() -> None:
    live = evidence([1.0] * 40)
    new = heard([1.0] * 20 + [0.0] * 20, 0.9, [3] * 20 + [7] * 20)
    decision = decide("if_better", "classification", new, live)
    assert (decision.promote, decision.reason, decision.fallback) == (False, "disagrees", 7)
    told = decision.to_json()["agreement"]
    assert (told["examples"], told["agreed"], told["expected"]) == (40, 0.5, pytest.approx(0.9))
    assert told["doubt"] > 25.0
    assert decide("always", "classification", new, live).promote
    # As many that agree as was claimed.
    assert decide("if_better", "classification", heard([1.0] * 36 + [0.0] * 4, 0.9, [3] * 40), live).promote


def test_what_was_chosen_for_being_wrong_does_not_speak_against_a_version() -> None:
    new = heard([0.0] * 40, 0.9, [3] * 40)
    chosen = replace(new, sampled=(False,) * 40 + (True,) * 40)
    assert decide("if_better", "classification", chosen, evidence([1.0] * 40)).promote
    fresh = replace(evidence([1.0] * 10), sampled=(False,) * 5 + (True,) * 5)
    assert unlearned("classification", fresh, evidence([1.0] * 3)) == [5, 6, 7, 8, 9]


def test_only_new_inputs_of_known_labels_are_asked_about_and_once_each() -> None:
    live = evidence([1.0] * 4)
    targets: list[Target] = ["a", "b", "a", "b", "a", "c", "b", "b"]
    new = evidence([1.0] * 8, targets)
    # The first is known under another id, and the last two are one input.
    new = replace(new, ids=("z", *new.ids[1:]), digests=(*new.digests[:7], new.digests[6]))
    assert unlearned("classification", new, live) == [4, 6]


def test_a_repair_takes_its_examples_out_of_the_doubt() -> None:
    live = heard([0.0] * 40, 0.9, [3] * 40)
    repaired: list[Target] = ["b" if target == "a" else "a" for target in live.targets[:40]]
    new = evidence([1.0] * 80, [*repaired, *live.targets[40:]])
    assert decide("if_better", "classification", remember(new, live, 4, (), None), live).promote
    removed = evidence([1.0] * 40, live.targets[40:])
    removed = replace(removed, ids=live.ids[40:], digests=live.digests[40:])
    assert decide("if_better", "classification", remember(removed, live, 4, (), None), live).promote
    kept = remember(evidence([1.0] * 80, live.targets), live, 4, (), None)
    assert decide("if_better", "classification", kept, live).reason == "disagrees"


def test_a_measured_version_is_not_replaced_by_one_that_is_not() -> None:
    live = evidence([1.0] * 40)
    other = replace(evidence([np.nan] * 10, ["a", "b"] * 5), ids=tuple("0123456789"))
    other = replace(other, digests=tuple(f"{digit:f>64}" for digit in "0123456789"))
    decision = decide("if_better", "classification", other, live)
    assert (decision.promote, decision.reason) == (False, "not_measured")
    measured = replace(other, scores=np.ones(10, np.float32))
    assert decide("if_better", "classification", measured, live).promote


def test_an_adapter_that_grows_from_one_example_of_each_label_stays_live() -> None:
    labels: list[Target] = list("abcdefgh")
    live = evidence([np.nan] * 8, labels)
    for count in range(1, 9):
        scores = [1.0 if place < count else np.nan for place in range(8)] + [1.0] * count
        new = evidence(scores, labels + labels[:count])
        assert decide("if_better", "classification", new, live).promote
        live = new


def test_an_example_with_another_input_was_corrected() -> None:
    live = evidence([1.0] * 10)
    new = Evidence(live.ids, ("f" * 64, *live.digests[1:]), live.targets, np.zeros(10, np.float32))
    assert decide("if_better", "classification", new, live).reason == "example_corrected"


def test_only_examples_that_both_have_and_scored_are_compared() -> None:
    live = evidence([1.0] * 10)
    new = evidence([np.nan] * 3 + [1.0] * 7 + [0.0] * 30)
    decision = decide("if_better", "classification", new, live)
    assert decision.promote
    assert decision.with_live.compared == 7
    assert decision.to_json()["compared"] == 7


def test_without_scores_there_is_nothing_to_hold_against_it() -> None:
    nothing = evidence([np.nan] * 4)
    decision = decide("if_better", "classification", nothing, nothing)
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
    assert decision.with_live.p_value is not None
    assert decision.with_live.p_value < 0.0004
    assert decision.promote


def test_a_regression_that_is_a_little_worse_everywhere_is_promoted() -> None:
    """One strength for all examples moves all their errors together: that is one event, and not twenty."""
    targets: list[Target] = [1.0] * 20
    live, new = evidence([-0.1] * 20, targets), evidence([-0.11] * 20, targets)
    assert decide("if_better", "regression", new, live).promote


def test_a_fine_tune_has_to_be_measurably_better() -> None:
    live = evidence([1.0] * 9 + [0.0] * 11)
    for scores, promoted, reason in (
        ([1.0] * 14 + [0.0] * 6, True, "better"),
        ([1.0] * 10 + [0.0] * 10, False, "cannot_tell"),
        ([0.0] + [1.0] * 9 + [0.0] * 10, False, "not_better"),
        ([0.0] * 20, False, "not_better"),
        ([np.nan] * 20, False, "not_comparable"),
    ):
        decision = decide_late("if_better", "classification", evidence(scores), live)
        assert (decision.promote, decision.reason) == (promoted, reason)
    assert decide_late("if_better", "classification", evidence([0.0]), None).reason == "first"
    assert decide_late("always", "classification", evidence([0.0] * 20), live).promote
    assert not decide_late("never", "classification", evidence([1.0] * 20), live).promote


def test_a_clear_win_of_a_fine_tune_is_promoted() -> None:
    """Nine points with two hundred held out, as on questions: 26 won and 8 lost."""
    live = evidence([1.0] * 152 + [0.0] * 48)
    tuned = evidence([0.0] * 8 + [1.0] * 144 + [1.0] * 26 + [0.0] * 22)
    assert decide_late("if_better", "classification", tuned, live).reason == "better"


def test_examples_that_came_while_it_trained_do_not_speak_for_a_fine_tune() -> None:
    tuned = evidence([0.0] * 10)
    more = decide_late("if_better", "classification", tuned, evidence([1.0] * 12))
    assert (more.promote, more.reason, more.with_live.compared) == (False, "not_better", 10)
    corrected = evidence([1.0] * 10, ["b", "b"] + ["a", "b"] * 4)
    found = decide_late("if_better", "classification", tuned, corrected)
    assert (found.promote, found.reason, found.with_live.compared) == (False, "not_better", 9)


def test_a_fine_tune_without_a_label_that_answers_now_is_withheld() -> None:
    live = evidence([0.0] * 11, ["a", "b"] * 5 + ["c"])
    decision = decide_late("if_better", "classification", evidence([1.0] * 10), live)
    assert (decision.promote, decision.reason) == (False, "label_missing")
