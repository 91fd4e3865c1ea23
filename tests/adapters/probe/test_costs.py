"""Costs of missing a label, on normal clouds whose best answers are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adapters.adaptation.promotion.agreement import ask
from adapters.adaptation.promotion.decision import decide
from adapters.heads.answers import answers_of, confidence_of, costs_of
from adapters.probe.fit import FittedProbe, ProbeConfig, fit
from adapters.storage.formats import Evidence
from models.arrays import Doubles, Floats, Integers
from tests.support.models.synthetic_embeddings import dataset

DIM = 12
NAMES = ("dear", "other", "usual")
SHARES = np.array([0.1, 0.3, 0.6])
COSTS = {"dear": 10.0, "never heard of": 3.0}
CENTRES = np.random.default_rng(7).standard_normal((3, DIM)) * 0.45


def draw(n: int, seed: int) -> tuple[Floats, Integers]:
    generator = np.random.default_rng(seed)
    own = generator.choice(3, n, p=SHARES)
    return (CENTRES[own] + generator.standard_normal((n, DIM))).astype(np.float32), own


def known_posteriors(rows: Floats) -> Doubles:
    squared = ((rows[:, None, :] - CENTRES) ** 2).sum(axis=2)
    odds = np.log(SHARES) - 0.5 * squared
    odds = np.exp(odds - odds.max(axis=1, keepdims=True))
    found: Doubles = odds / odds.sum(axis=1, keepdims=True)
    return found


def taught(costs: dict[str, float]) -> FittedProbe:
    rows, own = draw(1_500, 1)
    return fit(dataset(rows, [NAMES[label] for label in own]), ProbeConfig(costs=costs))


@pytest.fixture(scope="module")
def plain() -> FittedProbe:
    return taught({})


@pytest.fixture(scope="module")
def dear() -> FittedProbe:
    return taught(COSTS)


def cost(answers: Integers, own: Integers) -> float:
    """The mean cost of the answers: of each miss, the cost of the label that was missed."""
    return float(np.where(answers == own, 0.0, np.array([10.0, 1.0, 1.0])[own]).mean())


def test_costs_lower_the_cost_to_about_the_least_possible(plain: FittedProbe, dear: FittedProbe) -> None:
    rows, own = draw(20_000, 2)
    best = (known_posteriors(rows) * np.array([10.0, 1.0, 1.0])).argmax(axis=1)
    least = cost(best, own)
    before, after = (cost(one.head.predict(rows).answers, own) for one in (plain, dear))
    assert after < 0.8 * before
    assert least <= after < 1.1 * least


def test_costs_move_the_answers_and_no_probability(plain: FittedProbe, dear: FittedProbe) -> None:
    rows, own = draw(5_000, 3)
    before, after = plain.head.predict(rows), dear.head.predict(rows)
    np.testing.assert_allclose(before.probabilities, after.probabilities, atol=1e-6)
    assert before.chosen is None
    np.testing.assert_array_equal(before.answers, before.probabilities.argmax(axis=1))
    picked = after.probabilities[np.arange(len(rows)), after.answers]
    np.testing.assert_array_equal(after.confidence, picked)
    assert (after.answers != before.answers).mean() > 0.1
    rare = own == 0
    assert (after.answers[rare] == 0).mean() > (before.answers[rare] == 0).mean() + 0.2


def test_the_report_is_of_the_answers_as_given(plain: FittedProbe, dear: FittedProbe) -> None:
    rows, own = draw(20_000, 4)
    answers = dear.head.predict(rows).answers
    report = dear.report
    low, high = report["accuracy_interval"]
    assert low < (answers == own).mean() < high
    assert report["accuracy"] < plain.report["accuracy"]
    recall = (answers[own == 0] == 0).mean()
    assert report["per_label"]["dear"]["recall"] == pytest.approx(recall, abs=0.08)
    assert report["per_label"]["dear"]["recall"] > plain.report["per_label"]["dear"]["recall"] + 0.2
    assert sum(report["confusion"]["usual"].values()) == report["per_label"]["usual"]["support"]
    assert report["calibration_error"] < 0.05
    # Costs say nothing about whether a label is wrong.
    assert report["suspects"] == plain.report["suspects"]


def test_costs_neither_withhold_a_version_nor_raise_doubt(plain: FittedProbe, dear: FittedProbe) -> None:
    """Promotion judges what was learned, so a version that gets costs is not worse than the one without."""
    np.testing.assert_array_equal(dear.scores, plain.scores)
    rows, own = draw(1_500, 1)
    data = dataset(rows, [NAMES[label] for label in own])
    ids = tuple(map(str, range(len(own))))
    evidence = [
        Evidence(ids, tuple(data.digests), tuple(data.targets), fitted.scores, ()) for fitted in (dear, plain)
    ]
    assert decide("if_better", "classification", *evidence).promote
    asked, truth = draw(500, 6)
    targets = [NAMES[label] for label in truth]
    said, before = (
        ask("classification", fitted.head, known, asked, targets)
        for fitted, known in zip((dear, plain), evidence, strict=True)
    )
    assert said is not None
    assert before is not None
    np.testing.assert_array_equal(said.agreed, before.agreed)
    np.testing.assert_allclose(said.expected, before.expected)


def test_what_is_answered_is_as_right_as_wanted_with_costs_too(dear: FittedProbe) -> None:
    rows, own = draw(20_000, 5)
    found = dear.head.predict(rows)
    given = ~found.abstained
    assert given.mean() > 0.05
    assert (found.answers == own)[given].mean() > 0.93
    assert (found.confidence[given] >= dear.report["threshold"]).all()


def test_equal_costs_are_none(plain: FittedProbe) -> None:
    same = taught(dict.fromkeys(NAMES, 4.0))
    assert same.head.to_bytes() == plain.head.to_bytes()
    assert taught({"never heard of": 3.0}).head.to_bytes() == plain.head.to_bytes()


def test_labels_are_balanced_or_have_costs() -> None:
    with pytest.raises(ValueError, match="either"):
        ProbeConfig(balanced=True, costs=COSTS)
    replace(ProbeConfig(balanced=True), balanced=False, costs=COSTS)


def test_the_answer_is_the_first_of_the_worst_to_miss() -> None:
    chances = np.array([[0.1, 0.2, 0.7], [0.3, 0.1, 0.6], [0.25, 0.25, 0.5]], np.float32)
    assert costs_of({"b": 2.0}, "abc").tolist() == [1.0, 2.0, 1.0]
    assert costs_of({"z": 2.0}, "abc").tolist() == []
    assert answers_of(chances, costs_of({}, "abc")).tolist() == [2, 2, 2]
    answers = answers_of(chances, costs_of({"a": 2.0, "b": 4.0}, "abc"))
    assert answers.tolist() == [1, 0, 1]
    assert confidence_of(chances, answers).tolist() == pytest.approx([0.2, 0.3, 0.25])
