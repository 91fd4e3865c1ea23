"""Multilabel heads: what they report where the truth is known, and when their decisions can be relied on."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from adapters.heads.head import Head
from adapters.probe.calibration import temperatures
from adapters.probe.fit import Dataset, FittedProbe, fit
from models.arrays import Bools, Floats
from tests.support.models.synthetic_embeddings import dataset, permuted


def test_the_interval_of_micro_f1_holds_the_truth_on_coin_flips() -> None:
    """Labels that have nothing to do with the inputs: no threshold is better than constant labels."""
    held, gaps, warned = [], [], []
    for chance in (0.5, 0.2, 0.05):
        for seed in range(25):
            own = np.random.default_rng([seed, int(100 * chance)]).random((1_020, 5)) < chance
            rows = np.random.default_rng([seed, 1]).standard_normal((1_020, 64)).astype(np.float32)
            report = (fitted := taught(rows[:20], own[:20])).report
            assert report["micro_f1"] is not None
            true = micro_f1(fitted.head, rows[20:], own[20:])
            low, high = report["micro_f1_interval"]
            held.append(low <= true <= high)
            gaps.append(report["micro_f1"] - true)
            warned.append([warning["code"] for warning in report["warnings"]] == ["no_better_than_constant"])
    assert np.mean(held) >= 0.93
    assert abs(np.mean(gaps)) < 0.05
    assert np.mean(warned) > 0.95


def test_inputs_sent_twice_do_not_narrow_the_interval() -> None:
    held = []
    for seed in range(25):
        own = np.random.default_rng(seed).random((1_040, 3)) < 0.3
        rows = np.random.default_rng([seed, 1]).standard_normal((1_040, 100)).astype(np.float32)
        twice = np.repeat(np.arange(40), 2)
        fitted = taught(rows[twice], own[twice], [f"{row:064x}" for row in twice])
        low, high = fitted.report["micro_f1_interval"]
        held.append(low <= micro_f1(fitted.head, rows[40:], own[40:]) <= high)
    assert np.mean(held) >= 0.92


def test_the_constant_answer_is_the_best_of_all_that_ignore_the_input() -> None:
    own = np.random.default_rng(0).random((30, 4)) < (0.7, 0.5, 0.3, 0.1)
    rows = np.random.default_rng(1).standard_normal((30, 8)).astype(np.float32)
    answers = [np.array([subset >> label & 1 for label in range(4)], dtype=bool) for subset in range(1, 16)]
    best = max(_f1(own, np.tile(answer, (30, 1))) for answer in answers)
    assert taught(rows, own).report["constant_f1"] == pytest.approx(best)


def test_what_can_be_learned_is_better_than_constant() -> None:
    rows, own = learnable(200, 4)
    fitted = taught(rows, own)
    test_rows, test_own = learnable(2_000, 4, seed=1)
    low, high = fitted.report["micro_f1_interval"]
    assert low <= micro_f1(fitted.head, test_rows, test_own) <= high
    assert low > fitted.report["constant_f1"]
    assert fitted.report["warnings"] == []


@pytest.mark.parametrize(("n", "labels"), [(60, 24), (200, 24), (60, 3), (200, 3)])
def test_decisions_that_are_not_uncertain_are_right_as_promised(n: int, labels: int) -> None:
    """The promised precision holds, with nearly as many decisions as the best thresholds in hindsight."""
    right_shares, made, possible = [], 0, 0
    for seed in range(6):
        rows, own = learnable(n, labels, seed=seed)
        head = taught(rows, own).head
        rows, own = learnable(1_000, labels, seed=100 + seed)
        found = head.predict(rows)
        assert found.assigned is not None
        assert found.uncertain is not None
        right, sure = found.assigned == _known(head, own), ~found.uncertain
        confidence = np.where(found.assigned, found.probabilities, 1.0 - found.probabilities)
        right_shares.append(right[sure].mean())
        made += int(sure.sum())
        for kind in (found.assigned, ~found.assigned):
            possible += _most_at(confidence[kind], right[kind], 0.95)
    assert np.mean(right_shares) >= 0.94
    assert made >= 0.85 * possible


def test_abstains_where_every_decision_is_uncertain_and_only_there() -> None:
    rows, own = learnable(60, 3)
    head = taught(rows, own).head
    familiar = head.predict(learnable(500, 3, seed=1)[0])
    strange = head.predict(learnable(500, 3, seed=1)[0] + 6.0)
    for found in (familiar, strange):
        assert found.uncertain is not None
        assert np.array_equal(found.abstained, found.uncertain.all(axis=1))
    assert familiar.abstained.mean() < 0.3
    assert strange.abstained.mean() > 0.95


def test_labels_of_one_example_count_as_missed() -> None:
    rows, own = learnable(80, 2)
    alone = np.zeros((80, 20), dtype=bool)
    alone[np.arange(20), np.arange(20)] = True
    fitted, before = taught(rows, np.concatenate([own, alone], axis=1)), taught(rows, own)
    assert before.report["labels_not_measured"] == 0
    assert fitted.report["labels_not_measured"] == 20
    assert fitted.report["per_label"]["label 2"]["f1"] is None
    assert fitted.report["per_label"]["label 2"]["support"] == 1
    # Half of the examples have the first label and 0.4 the second: one label in five is one of the twenty.
    assert fitted.report["micro_f1"] < before.report["micro_f1"] - 0.05
    assert (fitted.scores[:20] < 1.0).all()
    assert np.isfinite(fitted.scores).all()


@pytest.mark.parametrize("targets", [[("a",), ("b",)], [("a",), ()]])
def test_too_few_examples_to_measure_abstain(targets: list[tuple[str, ...]]) -> None:
    rows = np.eye(2, 8, dtype=np.float32)
    fitted = fit(dataset(rows, targets, "multilabel"))
    assert not fitted.head.measured
    assert fitted.head.predict(rows).abstained.all()
    assert fitted.report["micro_f1"] is None
    assert fitted.report["micro_f1_interval"] is None
    assert np.isnan(fitted.scores).all()


def test_what_is_not_sampled_is_learned_from_and_not_measured() -> None:
    rows, own = learnable(120, 3)
    sampled = np.arange(120) % 2 == 0
    fitted = taught(rows, own, sampled=sampled)
    assert np.array_equal(np.isfinite(fitted.scores), sampled)
    test_rows, test_own = learnable(1_000, 3, seed=1)
    only_sampled = taught(rows[sampled], own[sampled])
    assert micro_f1(fitted.head, test_rows, test_own) > micro_f1(only_sampled.head, test_rows, test_own)
    unmeasured = taught(rows, own, sampled=np.zeros(120, dtype=bool))
    assert not unmeasured.head.measured
    assert unmeasured.report["micro_f1"] is None


def test_corrections_alone_do_not_change_what_is_measured() -> None:
    """Wrong labels that are learned from only: the report speaks of the others, which are right."""
    rows, own = learnable(200, 3)
    more, wrong = learnable(20, 3, seed=1)
    fitted = taught(np.concatenate([rows, more]), np.concatenate([own, ~wrong]), sampled=np.arange(220) < 200)
    low, high = fitted.report["micro_f1_interval"]
    assert low <= micro_f1(fitted.head, *learnable(2_000, 3, seed=2)) <= high


def test_no_probability_is_nearer_to_certainty_than_examples_support() -> None:
    for n in (10, 40):
        rows, own = learnable(n, 3, apart=30.0)
        found = taught(rows, own).head.predict(learnable(500, 3, apart=60.0, seed=1)[0]).probabilities
        least = 0.25 / (n + 1)
        assert found.min() >= least - 1e-6
        assert found.max() <= 1.0 - least + 1e-6


@pytest.mark.parametrize(("n", "labels"), [(60, 12), (300, 3)])
def test_probabilities_are_as_good_as_logistic_regressions(n: int, labels: int) -> None:
    ours, theirs = [], []
    for seed in range(4):
        rows, own = learnable(n, labels, seed=seed)
        test_rows, test_own = learnable(1_000, labels, seed=50 + seed)
        head = taught(rows, own).head
        found = head.predict(test_rows).probabilities
        for column, name in enumerate(head.labels):
            label = int(name.split()[1])
            model = LogisticRegression(C=10.0, max_iter=300).fit(rows, own[:, label])
            theirs.append(_log_loss(test_own[:, label], model.predict_proba(test_rows)[:, 1]))
            ours.append(_log_loss(test_own[:, label], found[:, column]))
    assert np.mean(ours) < np.mean(theirs) + 0.005


def test_suspects_are_the_planted_errors() -> None:
    rows, own = learnable(300, 4, apart=8.0)
    generator = np.random.default_rng(5)
    planted = {(int(row), int(generator.integers(4))) for row in generator.choice(300, 30, replace=False)}
    wrong = own.copy()
    for row, label in planted:
        wrong[row, label] = ~wrong[row, label]
    report = taught(rows, wrong).report
    found = {(entry["index"], int(entry["label"].split()[1])) for entry in report["suspects"]}
    assert report["suspects_total"] == len(found)
    assert len(found & planted) >= 0.9 * len(found)
    assert len(found & planted) >= 0.6 * len(planted)
    for entry in report["suspects"]:
        there = wrong[entry["index"], int(entry["label"].split()[1])]
        assert entry["suggests"] == ("remove" if there else "add")
        assert 0.5 < entry["confidence"] < 1.0
    assert taught(rows, own).report["suspects_total"] < 10


def test_suspects_are_at_most_fifty_and_all_are_counted() -> None:
    rows, own = learnable(600, 4, apart=8.0)
    generator = np.random.default_rng(5)
    own[generator.random(own.shape) < 0.06] ^= True
    report = taught(rows, own).report
    assert len(report["suspects"]) == 50 < report["suspects_total"]
    confidences = [entry["confidence"] for entry in report["suspects"]]
    assert confidences == sorted(confidences, reverse=True)


def test_examples_in_any_order_give_the_same_head() -> None:
    rows, own = learnable(90, 5)
    data = _dataset(rows, own)
    order = np.random.default_rng(0).permutation(90)
    first, second = fit(data), fit(permuted(data, order))
    assert first.head.to_bytes() == second.head.to_bytes()
    assert np.array_equal(first.scores[order], second.scores, equal_nan=True)


def test_the_temperature_leaves_the_base_alone() -> None:
    """Labels are drawn from base + 3 z, with z as logits: the slope is about 3 for every base."""
    generator = np.random.default_rng(0)
    z = generator.standard_normal((4, 3_000)).astype(np.float32)
    base = np.broadcast_to(np.array([[-4.0], [-2.0], [0.0], [1.0]], dtype=np.float32), z.shape)
    targets = (generator.random(z.shape) < 1.0 / (1.0 + np.exp(-(base + 3.0 * z)))).astype(np.float32)
    temperature, loss = temperatures.sigmoid_temperature(z, targets, 0.03, base)
    assert 1.0 / temperature == pytest.approx(3.0, rel=0.1)
    assert loss < temperatures.sigmoid_temperature(z, targets, 0.03, np.zeros_like(base))[1]


def learnable(n: int, labels: int, *, apart: float = 4.0, seed: int = 0) -> tuple[Floats, Bools]:
    """n inputs with labels (n, labels), each along a direction of its own: half have the first, ever fewer
    the later ones; apart: by how many standard deviations."""
    generator = np.random.default_rng([seed, labels])
    own = generator.random((n, labels)) < 0.5 / (1.0 + 0.3 * np.arange(labels))
    directions = np.linalg.qr(np.random.default_rng(labels).standard_normal((48, labels)))[0].T
    rows = generator.standard_normal((n, 48)) + apart * own @ directions
    return rows.astype(np.float32), own


def taught(
    rows: Floats, own: Bools, digests: list[str] | None = None, sampled: Bools | None = None
) -> FittedProbe:
    return fit(_dataset(rows, own, digests, sampled))


def _dataset(
    rows: Floats, own: Bools, digests: list[str] | None = None, sampled: Bools | None = None
) -> Dataset:
    targets = [tuple(f"label {label}" for label in np.flatnonzero(some)) for some in own]
    return Dataset(
        rows,
        targets,
        digests or [f"{row:064x}" for row in range(len(rows))],
        "multilabel",
        "a fingerprint",
        sampled=() if sampled is None else sampled.tolist(),
    )


def micro_f1(head: Head, rows: Floats, own: Bools) -> float:
    """The true micro-F1 of the labels that the head knows."""
    assigned = head.predict(rows).assigned
    assert assigned is not None
    return _f1(_known(head, own), assigned)


def _known(head: Head, own: Bools) -> Bools:
    return own[:, [int(name.split()[1]) for name in head.labels]]


def _f1(own: Bools, assigned: Bools) -> float:
    return 2.0 * int((own & assigned).sum()) / max(int(own.sum() + assigned.sum()), 1)


def _most_at(confidence: Floats, right: Bools, wanted: float) -> int:
    """How many decisions, the surest first, can be made with the wanted share right."""
    shares = np.cumsum(right[np.argsort(-confidence)]) / np.arange(1, len(right) + 1)
    good = np.flatnonzero(shares >= wanted)
    return int(good[-1]) + 1 if len(good) else 0


def _log_loss(own: Bools, probabilities: NDArray[np.floating]) -> float:
    likely = np.where(own, probabilities, 1.0 - probabilities).astype(np.float64)
    return float(-np.log(np.maximum(likely, 1e-12)).mean())
