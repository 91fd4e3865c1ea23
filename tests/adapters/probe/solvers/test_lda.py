"""The closed-form discriminant against scikit-learn's, and its blend with logistic regression."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from adapters.probe.calibration import slopes
from adapters.probe.solvers.lda import Discriminant
from models.arrays import Floats

LABELS = 3
FOLDS = 5
COLUMNS = 12


@pytest.fixture
def rows() -> Floats:
    """Centred, as features are; 20 of every label, label after label."""
    rng = np.random.default_rng(0)
    means = 1.5 * rng.standard_normal((LABELS, COLUMNS))
    spread = rng.standard_normal((COLUMNS, COLUMNS)) / 3.0
    drawn = np.repeat(means, 20, axis=0) + rng.standard_normal((20 * LABELS, COLUMNS)) @ spread
    centred: Floats = (drawn - drawn.mean(axis=0)).astype(np.float32)
    return centred


LABELLED = np.repeat(np.arange(LABELS), 20)
DEALT = np.tile(np.arange(FOLDS), 20 * LABELS // FOLDS)


def reference(rows: Floats, labels: NDArray[np.int64], examples: int) -> LinearDiscriminantAnalysis:
    shrinkage = 1.0 / (1.0 + 2.0 * (examples / COLUMNS) ** 1.5)
    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(rows, labels)


def test_it_is_scikit_learn_s_discriminant(rows: Floats) -> None:
    weights = Discriminant(rows, LABELLED, LABELS, DEALT, COLUMNS).weights()
    logits = rows @ weights[:, :-1].T + weights[:, -1]
    expected = reference(rows, LABELLED, len(rows)).predict_proba(rows)
    np.testing.assert_allclose(softmax(logits, axis=1), expected, atol=1e-4)


def test_a_fold_is_predicted_from_the_others_only(rows: Floats) -> None:
    discriminant = Discriminant(rows, LABELLED, LABELS, DEALT, COLUMNS)
    for fold in range(FOLDS):
        own = fold == DEALT
        expected = reference(rows[~own], LABELLED[~own], len(rows)).predict_proba(rows[own])
        np.testing.assert_allclose(
            softmax(discriminant.held_out(range(fold, fold + 1)), axis=0).T, expected, atol=1e-4
        )


def test_a_small_fold_of_rows_in_their_eigenbasis_too(rows: Floats) -> None:
    wide = np.concatenate([rows, np.random.default_rng(1).standard_normal((len(rows), 30))], axis=1)
    wide -= wide.mean(axis=0)
    turned = (wide @ np.linalg.eigh(wide.T @ wide)[1]).astype(np.float32)
    dealt = np.full(len(rows), -1)
    dealt[:6], dealt[20:24], dealt[40:45] = 0, 1, 2
    updated, solved = (
        Discriminant(columns.astype(np.float32), LABELLED, LABELS, dealt, 42).held_out(range(3))
        for columns in (turned, wide)
    )
    # How noisy the means are is estimated in one of the two, and adds about the same to all labels.
    np.testing.assert_allclose(updated, solved, rtol=1e-3, atol=0.15)


def test_a_label_with_few_examples_is_no_further_away_for_that() -> None:
    """Means of few examples are longer than they should be; without a correction their labels would lose."""
    recalls = []
    for seed in range(4):
        generator = np.random.default_rng(seed)
        centres = 0.5 * generator.standard_normal((6, 200))
        labels = np.repeat(np.arange(6), [2, 2, 2, 30, 30, 30])
        rows = centres[labels] + generator.standard_normal((len(labels), 200))
        middle = rows.mean(axis=0)
        rows = (rows - middle).astype(np.float32)
        weights = Discriminant(rows, labels, 6, np.full(len(labels), -1), 200).weights()
        asked = np.repeat(np.arange(6), 300)
        unseen = centres[asked] + generator.standard_normal((len(asked), 200)) - middle
        answers = (unseen @ weights[:, :-1].T + weights[:, -1]).argmax(axis=1)
        recalls.append([(answers[asked == label] == label).mean() for label in range(6)])
    recall = np.mean(recalls, axis=0)
    assert recall[:3].mean() > 0.7
    assert recall[3:].mean() > 0.95


def test_a_label_whose_only_example_is_held_out(rows: Floats) -> None:
    labels = LABELLED.copy()
    labels[0] = LABELS
    discriminant = Discriminant(rows, labels, LABELS + 1, DEALT, COLUMNS)
    assert np.isfinite(discriminant.held_out(range(FOLDS))).all()


def logits_of(labels: NDArray[np.int64], strength: float, seed: int) -> Floats:
    """Logits that know the labels so well."""
    noise = np.random.default_rng(seed).standard_normal((LABELS, len(labels)))
    return (noise + strength * np.eye(LABELS)[:, labels]).astype(np.float32)


def loss_of(logits: Floats, labels: NDArray[np.int64]) -> float:
    return float(-log_softmax(logits, axis=0)[labels, np.arange(len(labels))].mean())


FLAT = np.zeros(LABELS, np.float32)


def test_two_that_know_different_things_are_better_together() -> None:
    labels = np.random.default_rng(1).integers(0, LABELS, 2_000)
    first, second = logits_of(labels, 1.5, 2), logits_of(labels, 1.0, 3)
    found = slopes.blend(first, second, FLAT, labels, 1.0)
    assert found.slope > found.other > 0.0
    assert found.loss == pytest.approx(loss_of(found.slope * first + found.other * second, labels), abs=1e-4)
    assert found.loss < min(loss_of(first * factor, labels) for factor in (0.5, 1.0, 1.5)) - 0.05
    # At the minimum of its own objective: no neighbour is better.
    for near in ((0.1, 0.0), (-0.1, 0.0), (0.0, 0.1), (0.0, -0.1)):
        moved = (found.slope + near[0]) * first + (found.other + near[1]) * second
        assert loss_of(moved, labels) > found.loss - 1e-5


def test_one_that_knows_nothing_or_the_opposite_does_not_count() -> None:
    labels = np.random.default_rng(4).integers(0, LABELS, 2_000)
    first = logits_of(labels, 1.5, 5)
    assert slopes.blend(first, logits_of(labels, 0.0, 6), FLAT, labels, 1.0).other < 0.05
    found = slopes.blend(first, -logits_of(labels, 1.0, 7), FLAT, labels, 1.0)
    assert (found.slope > 0.0, found.other) == (True, 0.0)


def test_logits_that_know_the_opposite_keep_the_order_of_labels() -> None:
    """With few examples the slope is small but not zero, so no head is a constant."""
    labels = np.random.default_rng(8).integers(0, LABELS, 30)
    first = -logits_of(labels, 2.0, 9)
    found = slopes.blend(first, np.zeros_like(first), FLAT, labels, 0.4)
    assert 0.0 < found.slope < 0.2


def test_the_scale_of_logits_does_not_matter() -> None:
    labels = np.random.default_rng(10).integers(0, LABELS, 40)
    first, second = logits_of(labels, 1.0, 11), logits_of(labels, 1.0, 12)
    one = slopes.blend(first, second, FLAT, labels, 0.5)
    other = slopes.blend(50.0 * first, 0.02 * second, FLAT, labels, 0.5)
    assert 50.0 * other.slope == pytest.approx(one.slope, rel=1e-3)
    assert 0.02 * other.other == pytest.approx(one.other, rel=1e-2, abs=1e-4)


def test_without_examples_the_usual_slope_is_taken() -> None:
    nothing = np.zeros((LABELS, 0), np.float32)
    found = slopes.blend(nothing, nothing, FLAT, np.zeros(0, np.int64), 0.3)
    assert found.slope > 0.5
    assert (found.other, found.loss) == (0.0, 0.0)
