from __future__ import annotations

import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegressionCV

from adapters.probe.label_names import names_of_texts
from benchmarks.data import datasets
from benchmarks.data.embeddings import EmbeddedSet
from benchmarks.data.label_names import LABEL_NAMES, NAMES_IN_ANOTHER_LANGUAGE
from benchmarks.data.spoken_names import TRUE
from benchmarks.training import few_shot, heads
from benchmarks.training.few_shot import MANY, Cell, Run
from models.arrays import Doubles, Floats

# scikit-learn shrinks the covariance of every label by itself, which two examples say nothing about.
FAILS = ("LDA, shrinkage", 2)


def _clusters(per_label: int, labels: int = 4, dim: int = 32, spread: float = 0.05) -> EmbeddedSet:
    """Unit vectors around orthogonal centres."""
    generator = np.random.default_rng(3)
    own = np.repeat(np.arange(labels), per_label)
    rows = np.eye(dim)[own] + generator.normal(0.0, spread, (len(own), dim))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    names = np.array([f"label {number}" for number in own])
    return EmbeddedSet("clusters", rows, names, np.full(len(own), np.nan))


@pytest.mark.parametrize("examples", [1, 2, 16])
@pytest.mark.parametrize("name", heads.HEADS)
def test_every_head_tells_clusters_apart(name: str, examples: int) -> None:
    data = _clusters(40)
    learned, tested = few_shot.drawn(data, examples, seed=0)
    answers = heads.HEADS[name](data.rows[learned], data.labels[learned], data.rows[tested])
    assert (answers == data.labels[tested]).all() or (name, examples) == FAILS


def test_names_alone_answer_without_an_example() -> None:
    data = _clusters(10)
    centres = dict(zip(np.unique(data.labels).tolist(), np.eye(32, dtype=np.float32)[:4], strict=True))
    said = names_of_texts(centres, np.zeros(32, np.float32))
    known = heads.heads_with_names({TRUE: said})[heads.NAMES_ALONE]
    assert (known(data.rows[:0], data.labels[:0], data.rows) == data.labels).all()


def test_draws_are_nested_and_never_tested_on() -> None:
    data = _clusters(40)
    several = {examples: few_shot.drawn(data, examples, seed=5) for examples in few_shot.SHOTS}
    for examples, (learned, tested) in several.items():
        assert np.unique(data.labels[learned], return_counts=True)[1].tolist() == [examples] * 4
        assert not set(learned) & set(tested)
        assert tested.tolist() == several[1][1].tolist()
        assert set(learned) <= set(several[16][0])


def test_a_label_with_few_samples_is_tested_too() -> None:
    data = _clusters(40)
    kept = np.concatenate([np.arange(5), np.arange(40, 160)])
    few = EmbeddedSet("few", data.rows[kept], data.labels[kept], data.values[kept])
    learned, tested = few_shot.drawn(few, 16, seed=0)
    assert (few.labels[learned] == "label 0").sum() == 2
    assert (few.labels[tested] == "label 0").sum() == 3


def test_a_thousand_examples_are_drawn_as_they_come() -> None:
    data = _clusters(500)
    learned, tested = few_shot.drawn(data, MANY, seed=0)
    assert (len(learned), len(tested)) == (1_000, 1_000)
    assert not set(learned) & set(tested)


def test_leave_one_out_of_kernel_ridge_chooses_as_refitting_does() -> None:
    """The chosen width and ridge are the best of all, each refitted without every single row."""
    generator = np.random.default_rng(0)
    rows: Doubles = generator.normal(size=(12, 3))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    targets: Doubles = np.eye(2)[(rows[:, 0] > 0).astype(int)]
    test: Doubles = generator.normal(size=(5, 3))
    usual = np.median([((a - b) ** 2).sum() for i, a in enumerate(rows) for b in rows[i + 1 :]])
    best = (np.inf, np.zeros((5, 2)))
    for width in heads.WIDTHS:
        for ridge in heads.RIDGES:
            model = KernelRidge(alpha=ridge, kernel="rbf", gamma=1.0 / (width * usual))
            errors = []
            for out in range(12):
                others = np.arange(12) != out
                model.fit(rows[others], targets[others])
                errors.append(((model.predict(rows[out : out + 1]) - targets[out]) ** 2).mean())
            loss = float(np.mean(errors))
            if loss < best[0]:
                best = (loss, model.fit(rows, targets).predict(test))
    np.testing.assert_allclose(heads.kernel_ridge(rows, targets, test), best[1], atol=1e-8)


def test_logistic_regression_in_the_span_of_the_rows_answers_alike() -> None:
    data = _clusters(30, spread=0.5)
    learned, tested = few_shot.drawn(data, 4, seed=1)
    train: Floats = data.rows[learned]
    labels, test = data.labels[learned], data.rows[tested]
    whole = LogisticRegressionCV(
        Cs=10, cv=4, max_iter=1_000, l1_ratios=(0.0,), scoring="accuracy", use_legacy_attributes=False
    ).fit(train, labels)
    same = heads.HEADS["LogisticRegressionCV"](train, labels, test) == whole.predict(test)
    assert same.mean() > 0.98


def test_ranks_and_margins_of_known_runs() -> None:
    """Ours is second of all in one cell and first in the other."""
    low = dict.fromkeys(heads.HEADS, 0.5)
    runs = {
        Cell("one", 4): [
            Run({**low, heads.OURS: 0.70, "nearest mean": 0.74}, low),
            Run({**low, heads.OURS: 0.72, "nearest mean": 0.74}, low),
        ],
        Cell("two", 4): [Run({**low, heads.OURS: 0.9}, low)],
    }
    found = few_shot.ranks(runs)
    assert found[heads.OURS] == 1.5
    beside = few_shot.margin(Cell("one", 4), runs[Cell("one", 4)])
    assert (beside.best, round(beside.points, 6), round(beside.error, 6)) == ("nearest mean", -3.0, 1.0)
    assert few_shot.margin(Cell("two", 4), runs[Cell("two", 4)]).points == pytest.approx(40.0)


@pytest.mark.parametrize("name", ["trec-coarse", "trec-fine", "sms-spam", "chatter-nl", "sayings-de"])
def test_every_label_has_a_name(name: str) -> None:
    assert set(LABEL_NAMES[name]) == set(datasets.load(name).labels)
    assert len(set(LABEL_NAMES[name].values())) == len(LABEL_NAMES[name])


def test_names_in_another_language_are_of_the_same_labels() -> None:
    assert set(LABEL_NAMES) == set(datasets.NAMES)
    for (name, _), names in NAMES_IN_ANOTHER_LANGUAGE.items():
        assert set(names) == set(LABEL_NAMES[name])
