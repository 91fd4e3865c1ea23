"""Reports of classification heads on data with a known truth."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from adapters.heads.head import Head
from adapters.probe.calibration import measures
from adapters.probe.fit import Dataset, FittedProbe, ProbeConfig, fit
from models.arrays import Floats
from tests.support.models.synthetic_embeddings import clouds, dataset


def unseen(labels: int, dim: int, apart: float) -> tuple[Floats, list[str]]:
    return clouds(100 * labels, dim, labels, apart=apart, seed=99)


def accuracy(fitted: FittedProbe, rows: Floats, names: list[str]) -> float:
    answers = fitted.head.predict(rows).answers
    return float((np.array(fitted.head.labels)[answers] == np.array(names)).mean())


@pytest.mark.parametrize("labels", [3, 5, 10, 14])
@pytest.mark.parametrize("more", [1, 2])
def test_second_examples_of_one_label_do_not_make_it_the_only_answer(labels: int, more: int) -> None:
    rows, names = clouds(labels * 4, 64, labels, apart=6.0)
    first = fit(dataset(rows[:labels], names[:labels]))
    extra = [labels * (1 + step) for step in range(more)]
    some = [*range(labels), *extra]
    grown = fit(dataset(rows[some], [names[row] for row in some]))
    asked, truth = unseen(labels, 64, 6.0)
    assert accuracy(grown, asked, truth) > accuracy(first, asked, truth) - 0.03
    predictions = grown.head.predict(asked)
    assert predictions.confidence.max() < 0.9
    assert predictions.abstained.all()


@pytest.mark.parametrize("per_label", [2, 3, 4, 8])
def test_no_head_of_two_labels_is_a_constant(per_label: int) -> None:
    """Labels that can hardly be told apart: out of fold it often looks worse than chance."""
    for seed in range(40):
        rows, names = clouds(2 * per_label, 64, 2, apart=0.4, seed=seed)
        fitted = fit(dataset(rows, names))
        answers = fitted.head.predict(unseen(2, 64, 0.4)[0]).probabilities.argmax(axis=1)
        assert 0.02 < answers.mean() < 0.98


def test_an_adapter_that_cannot_be_measured_abstains_and_says_so() -> None:
    rows, names = clouds(6, 32, 6, apart=8.0)
    fitted = fit(dataset(rows, names))
    assert not fitted.head.measured
    assert fitted.report["accuracy"] is None
    assert fitted.report["method"] == "not measured"
    assert [warning["code"] for warning in fitted.report["warnings"]] == ["not_measured"]
    assert fitted.head.predict(unseen(6, 32, 8.0)[0]).abstained.all()


@pytest.mark.parametrize("per_label", [2, 5, 20])
def test_no_confidence_is_higher_than_examples_support(per_label: int) -> None:
    rows, names = clouds(3 * per_label, 64, 3, apart=40.0)
    fitted = fit(dataset(rows, names))
    assert fitted.head.smoothing >= 0.5 / (3 * per_label + 1) - 1e-9
    highest = fitted.head.predict(unseen(3, 64, 40.0)[0]).confidence.max()
    assert highest <= 1.0 - fitted.head.smoothing * 2 / 3 + 1e-6


def test_labels_with_one_example_count_as_wrong() -> None:
    rows, names = clouds(60, 64, 12, apart=6.0)
    some = [row for row in range(60) if row % 12 < 2 or row < 12]
    fitted = fit(dataset(rows[some], [names[row] for row in some]))
    report = fitted.report
    assert report["labels_not_measured"] == 10
    assert report["accuracy"] <= 10 / 20
    low, high = report["accuracy_interval"]
    assert low < report["accuracy"] < high
    # They may be as easy as the two that were measured.
    assert high > 0.6
    assert "labels_not_measured" in [warning["code"] for warning in report["warnings"]]


def test_imbalance_is_told() -> None:
    rows, names = clouds(400, 32, 2, apart=1.5)
    some = [row for row in range(400) if row % 2 == 0 or row < 12]
    report = fit(dataset(rows[some], [names[row] for row in some])).report
    assert report["majority_share"] == pytest.approx(200 / 206)
    assert report["balanced_accuracy"] < report["accuracy"] - 0.2
    codes = {warning["code"] for warning in report["warnings"]}
    assert codes >= {"low_recall", "no_better_than_majority"}


def test_balanced_weights_find_more_of_what_is_rare() -> None:
    rows, names = clouds(400, 32, 2, apart=1.0)
    some = [row for row in range(400) if row % 2 == 0 or row < 60]
    data = dataset(rows[some], [names[row] for row in some])
    asked, truth = unseen(2, 32, 1.0)
    rare = [place for place, name in enumerate(truth) if name == "label 1"]
    found = [
        accuracy(fit(data, ProbeConfig(balanced=balanced)), asked[rare], ["label 1"] * len(rare))
        for balanced in (False, True)
    ]
    assert found[1] > found[0] + 0.1


def test_what_was_chosen_for_being_wrong_is_learned_and_not_measured() -> None:
    rows, names = clouds(200, 32, 4, apart=3.0)
    data = dataset(rows, names)
    before = fit(data)
    generator = np.random.default_rng(5)
    hard = rows[:40] + generator.standard_normal((40, 32)).astype(np.float32)
    more = Dataset(
        np.concatenate([rows, hard]),
        names + names[:40],
        [*data.digests, *(f"{row:064x}" for row in range(1_000, 1_040))],
        data.task,
        data.fingerprint,
        sampled=[True] * 200 + [False] * 40,
    )
    after = fit(more)
    assert np.isnan(after.scores[200:]).all()
    assert np.isfinite(after.scores[:200]).all()
    assert sum(one["support"] for one in after.report["per_label"].values()) == 240
    assert after.head.to_bytes() != before.head.to_bytes()


def test_groups_do_not_judge_each_other() -> None:
    """Customers with a way of their own: with others of theirs in training, coin flips seem to be known."""
    generator = np.random.default_rng(0)
    customers = np.repeat(np.arange(30), 6)
    rows = generator.standard_normal((30, 64))[customers] + 0.9 * generator.standard_normal((180, 64))
    names = generator.choice(["a", "b"], 30)[customers].tolist()
    data = dataset(rows.astype(np.float32), names)
    flattered = fit(data).report["accuracy"]
    honest = fit(replace(data, groups=[f"customer {one}" for one in customers])).report
    assert flattered > honest["accuracy"] + 0.15
    low, high = honest["accuracy_interval"]
    assert low < 0.5 < high


def test_the_suspects_are_counted() -> None:
    rows, names = clouds(600, 32, 3, apart=8.0)
    flipped = np.random.default_rng(0).random(600) < 0.15
    wrong = [f"label {(int(name[-1]) + flip) % 3}" for name, flip in zip(names, flipped, strict=True)]
    report = fit(dataset(rows, wrong)).report
    assert len(report["suspects"]) == 50
    assert report["suspects_total"] == pytest.approx(flipped.sum(), rel=0.15)


def test_heads_of_the_first_format_answer_as_they_did() -> None:
    rows, names = clouds(60, 16, 3)
    head = replace(fit(dataset(rows, names)).head, smoothing=0.0)
    data = head.to_bytes()
    length = int.from_bytes(data[:8], "little")
    facts = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["head"])
    for added in ("smoothing", "certain", "measured"):
        del facts[added]
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["head"] = json.dumps({**facts, "format": 1}, sort_keys=True)
    old = json.dumps(header).encode()
    old += b" " * (-len(old) % 8)
    read = Head.from_bytes(len(old).to_bytes(8, "little") + old + data[8 + length :])
    np.testing.assert_array_equal(read.predict(rows).probabilities, head.predict(rows).probabilities)
    assert read.measured


def test_the_threshold_is_where_the_expected_share_is_right() -> None:
    confidence = np.array([0.99, 0.98, 0.97, 0.9, 0.8, 0.6], np.float32)
    right = np.array([True, True, True, True, False, True])
    # The mean of the first four is 0.96, of the first five 0.93.
    assert measures.answer_threshold(confidence, right, 0.95) == pytest.approx(0.9)
    # Nothing is that good: what is wanted, of each answer.
    assert measures.answer_threshold(confidence, right, 0.995) == pytest.approx(0.995)
    assert measures.answer_threshold(confidence, right, 0.5) == 0.0
    # With many answers their share of errors counts, not their confidence.
    sure = np.full(1_000, 0.99, np.float32)
    assert measures.answer_threshold(sure, np.arange(1_000) % 4 > 0, 0.95) > 0.99
    hesitant = np.linspace(0.7, 0.9, 1_000).astype(np.float32)
    assert measures.answer_threshold(hesitant, np.ones(1_000, np.bool_), 0.95) == 0.0
