from __future__ import annotations

import math

import numpy as np
import pytest

from adapters.examples.target import Task
from adapters.probe.fit import fit
from benchmarks.honesty.scores import Answers, Claim, Claims, Known, chance_score, even_weights, true_score


def _answers(confidence: list[float], right: list[int], answered: list[int]) -> Answers:
    weights = np.full(len(right), 1.0 / len(right))
    return Answers(np.array(confidence), np.array(right, bool), np.array(answered, bool), weights)


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_the_score_by_chance_is_that_of_many_drawn_targets(task: Task) -> None:
    generator = np.random.default_rng(0)
    names, shares = ("a", "b"), np.array([0.7, 0.3])
    rows = generator.standard_normal((8_040, 8), dtype=np.float32)
    drawn = {
        "classification": np.array(names)[generator.choice(2, len(rows), p=shares)],
        "multilabel": generator.random((len(rows), 2)) < shares,
        "regression": 3.0 + 2.0 * generator.standard_normal(len(rows)),
    }
    known = Known("drawn", task, rows, drawn[task], names)
    head = fit(known.dataset(np.arange(40))).head
    expected = true_score(known, head, np.arange(40, len(rows)))
    chances = dict(zip(names, shares.tolist(), strict=True))
    assert chance_score(head, rows[40:], chances, 3.0, 2.0) == pytest.approx(expected, abs=0.03)


def test_claims_count_what_was_measured_only() -> None:
    missing = Claim(math.nan, math.nan, math.nan, 0.5)
    claims = Claims((Claim(0.6, 0.4, 0.8, 0.5), Claim(0.9, 0.8, 1.0, 0.5), missing))
    assert len(claims.measured) == 2
    assert claims.coverage == 0.5
    assert claims.optimism == pytest.approx(0.25)
    assert claims.true == 0.5
    assert math.isnan(Claims((missing,)).coverage)


def test_weights_give_labels_the_same_share_or_the_one_named() -> None:
    labels = np.array(["a", "a", "a", "b"])
    assert even_weights(labels).tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert even_weights(labels, {"a": 3.0, "b": 1.0}).tolist() == pytest.approx([0.25] * 4)


def test_answers_are_judged_where_they_are_given() -> None:
    found = _answers([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1], [1, 0, 1, 0])
    assert found.accuracy == 0.75
    assert found.coverage == 0.5
    assert found.accuracy_answered == 0.5
    assert math.isnan(_answers([0.9], [1], [0]).accuracy_answered)


def test_hindsight_takes_the_largest_share_that_is_right_enough() -> None:
    found = _answers([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1], [0] * 4)
    assert found.coverage_in_hindsight(0.95) == 0.5
    assert found.coverage_in_hindsight(0.75) == 1.0
    assert _answers([0.9, 0.8], [0, 1], [0, 0]).coverage_in_hindsight(0.95) == 0.0
    # Equal confidences cannot be told apart by a threshold.
    assert _answers([0.9, 0.9], [1, 0], [0, 0]).coverage_in_hindsight(0.95) == 0.0


def test_the_calibration_error_of_one_bin_is_its_gap() -> None:
    found = _answers([0.9] * 10, [1] * 6 + [0] * 4, [1] * 10)
    assert found.calibration_error == pytest.approx(0.3)


def test_answers_of_several_heads_count_alike() -> None:
    joined = Answers.joined([_answers([0.9], [1], [1]), _answers([0.9, 0.8], [0, 0], [1, 0])])
    assert joined.accuracy == pytest.approx(0.5)
    assert joined.coverage == pytest.approx(0.75)
