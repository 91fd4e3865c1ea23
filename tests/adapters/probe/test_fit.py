"""Fits: right, honest, deterministic, bounded; beside scikit-learn where it solves the same problem."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, Ridge

from adapters.examples.target import Target
from adapters.heads.scaling import scaling_of
from adapters.probe.fit import Dataset, OneLabel, ProbeConfig, TooCostly, fit, predicted_seconds
from adapters.probe.solvers.basis import basis_of
from adapters.probe.solvers.logistic import Softmax, solve
from tests.support.models.synthetic_embeddings import classification, clouds, dataset, permuted


@pytest.mark.parametrize(("n", "dim"), [(60, 200), (300, 40), (700, 520)])
@pytest.mark.parametrize("strength", [0.03, 3.0])
def test_solves_what_scikit_learn_solves(n: int, dim: int, strength: float) -> None:
    rows, names = clouds(n, dim, 4, apart=3.0)
    labels = np.unique(names, return_inverse=True)[1]
    features = scaling_of(rows).apply(rows.copy())
    basis = basis_of(features)
    solved = solve(
        basis.design,
        Softmax(labels),
        4,
        np.ones((1, n), np.float32),
        np.array([strength], np.float32),
        tolerance=1e-9,
        max_iterations=300,
    ).weights[:, 0]
    weight, bias = basis.weights(solved)
    ours = np.exp(features @ weight.T + bias)
    ours /= ours.sum(axis=1, keepdims=True)
    reference = LogisticRegression(C=1.0 / strength, tol=1e-9, max_iter=5_000).fit(features, labels)
    assert np.abs(ours - reference.predict_proba(features)).max() < 5e-3


def test_is_as_right_as_scikit_learn_on_unseen_examples() -> None:
    train, test = clouds(200, 64, 5, apart=3.0, seed=1), clouds(1_000, 64, 5, apart=3.0, seed=2)
    fitted = fit(dataset(*train))
    answers = np.array(fitted.head.labels)[fitted.head.predict(test[0]).answers]
    ours = np.mean(answers == np.array(test[1]))
    reference = LogisticRegressionCV(
        Cs=10, cv=5, l1_ratios=(0.0,), scoring="accuracy", use_legacy_attributes=False
    )
    assert ours >= reference.fit(*train).score(*test) - 0.01


def test_the_same_examples_in_any_order_give_the_same_bytes() -> None:
    data = classification(150, 48, 4, apart=2.0)
    first = fit(data)
    order = np.random.default_rng(3).permutation(150)
    again = fit(permuted(data, order))
    assert again.head.to_bytes() == first.head.to_bytes()
    assert np.array_equal(again.scores, first.scores[order])
    suspects = {order[one["index"]] for one in again.report["suspects"]}
    assert suspects == {one["index"] for one in first.report["suspects"]}


def test_the_report_is_out_of_fold() -> None:
    """Labels drawn at random cannot be learned, however well they can be remembered."""
    rows = np.random.default_rng(0).standard_normal((200, 400)).astype(np.float32)
    names = [str(label) for label in np.random.default_rng(1).integers(0, 2, 200)]
    report = fit(dataset(rows, names)).report
    low, high = report["accuracy_interval"]
    assert low <= 0.5 <= high
    assert report["accuracy"] < 0.65


def test_the_report_can_be_written_as_json_and_adds_up() -> None:
    data = classification(90, 24, 3)
    fitted = fit(data)
    report = json.loads(json.dumps(fitted.report, allow_nan=False))
    assert report["method"] == "10-fold out-of-fold"
    right = sum(report["confusion"][label].get(label, 0) for label in report["confusion"])
    assert right == fitted.scores.sum() == round(report["accuracy"] * 90)
    assert {label: one["support"] for label, one in report["per_label"].items()} == {
        f"label {label}": 30 for label in range(3)
    }
    low, high = report["accuracy_interval"]
    assert 0 <= low <= report["accuracy"] <= high <= 1


def test_finds_the_labels_that_are_wrong() -> None:
    rows, names = clouds(200, 32, 2, apart=6.0)
    wrong = [5, 50, 101]
    for row in wrong:
        names[row] = "label 1" if names[row] == "label 0" else "label 0"
    suspects = fit(dataset(rows, names)).report["suspects"]
    assert {suspect["index"] for suspect in suspects[:3]} == set(wrong)


@pytest.mark.parametrize("dim", [3, 384])
def test_two_labels_with_one_example_each_are_enough(dim: int) -> None:
    rows = np.eye(2, dim, dtype=np.float32)
    fitted = fit(dataset(rows, ["a", "b"]))
    assert fitted.report["accuracy"] is None
    assert np.isnan(fitted.scores).all()
    assert [fitted.head.labels[place] for place in fitted.head.predict(rows).answers] == ["a", "b"]


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [2, 20, 60])
def test_identical_embeddings_do_not_break_it(n: int, value: float) -> None:
    rows = np.full((n, 16), value, dtype=np.float32)
    fitted = fit(dataset(rows, ["a", "b"] * (n // 2)))
    assert np.allclose(fitted.head.predict(rows).probabilities, 0.5)
    assert not fitted.head.measured


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dim", [8, 64])
def test_distances_from_nearly_identical_embeddings_are_finite(dim: int) -> None:
    generator = np.random.default_rng(0)
    rows = np.ones(dim) + 1e-7 * generator.standard_normal((8, dim))
    targets: list[Target] = [float(row) for row in range(8)]
    head = fit(dataset(rows.astype(np.float32), targets, "regression")).head
    assert head.region is not None
    found = head.predict(1e3 * generator.standard_normal((5, dim), dtype=np.float32))
    assert np.isfinite(found.distance).all()
    assert np.isfinite(found.abstention_score).all()
    assert found.abstained.all()


@pytest.mark.parametrize("task", ["classification", "regression", "multilabel"])
def test_one_target_in_total_is_refused(task: str) -> None:
    targets: dict[str, Target] = {"classification": "a", "regression": 1.0, "multilabel": ("a",)}
    with pytest.raises(OneLabel):
        fit(dataset(np.random.default_rng(0).random((6, 4)).astype(np.float32), [targets[task]] * 6, task))


def test_a_fit_that_would_take_too_long_is_refused_before_it_begins() -> None:
    data = classification(400, 64, 4)
    with pytest.raises(TooCostly) as refused:
        fit(data, ProbeConfig(limit_seconds=1e-3))
    assert refused.value.predicted_seconds > 1e-3
    assert predicted_seconds(20_000, 384, 1_000, "classification") < 30.0
    assert predicted_seconds(1_000_000, 1_280, 1_000, "classification") > 30.0


def test_many_labels_fit_in_bounded_memory() -> None:
    rows, names = clouds(2_000, 64, 200, apart=6.0)
    data = dataset(rows, names)
    config = ProbeConfig(memory_bytes=32 << 20)
    tracemalloc.start()
    try:
        fitted = fit(data, config)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (32 << 20) + 2 * rows.nbytes
    assert len(fitted.head.labels) == 200
    assert fitted.report["accuracy"] > 0.5


def test_regression_is_ridge_with_honest_r2() -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((300, 20)).astype(np.float32)
    truth = generator.standard_normal(20)
    targets = (rows @ truth + generator.standard_normal(300) * 2.0 + 7.0).tolist()
    fitted = fit(dataset(rows[:200], targets[:200], "regression"))
    values = fitted.head.predict(rows[200:]).values
    assert values is not None
    rest = np.array(targets[200:])
    r2 = 1 - ((rest - values) ** 2).sum() / ((rest - rest.mean()) ** 2).sum()
    reference = Ridge(alpha=1.0).fit(rows[:200], targets[:200]).score(rows[200:], rest)
    assert r2 > reference - 0.02
    low, high = fitted.report["r2_interval"]
    assert low <= fitted.report["r2"] <= high
    assert low - 0.1 < r2 < high + 0.1


def test_multilabel_learns_each_label_by_itself() -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((400, 24)).astype(np.float32)
    targets = [tuple(name for name, column in (("x", 0), ("y", 1)) if row[column] > 0) for row in rows]
    fitted = fit(dataset(rows[:300], targets[:300], "multilabel"))
    assigned = fitted.head.predict(rows[300:]).assigned
    assert assigned is not None
    wanted = np.array([[name in target for name in fitted.head.labels] for target in targets[300:]])
    assert (assigned == wanted).mean() > 0.9
    assert fitted.report["micro_f1"] > 0.85


def test_copies_of_an_input_do_not_flatter_the_report() -> None:
    """Every input twice: with copies on both sides of a fold, random labels would look learned."""
    rows = np.repeat(np.random.default_rng(0).standard_normal((60, 200)).astype(np.float32), 2, axis=0)
    names = [str(label) for label in np.repeat(np.random.default_rng(1).integers(0, 2, 60), 2)]
    digests = [f"{row // 2:064x}" for row in range(120)]
    report = fit(Dataset(rows, names, digests, "classification", "f")).report
    assert report["accuracy"] < 0.75
