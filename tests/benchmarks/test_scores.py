from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from benchmarks.harness import metrics


def test_auroc_is_scikit_learns_with_ties() -> None:
    generator = np.random.default_rng(0)
    positive, negative = (generator.integers(low, low + 9, 200).astype(np.float64) for low in (2, 0))
    expected = roc_auc_score([1] * 200 + [0] * 200, np.concatenate([positive, negative]))
    assert metrics.auroc(positive, negative) == pytest.approx(expected)


def test_f1_is_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    predicted, true = (generator.choice(["spam", "ham"], 100).tolist() for _ in range(2))
    assert metrics.f1(predicted, true, "spam") == pytest.approx(f1_score(true, predicted, pos_label="spam"))
    assert metrics.f1(["ham"], ["ham"], "spam") == 0


def test_calibration_error_of_one_bin_is_its_gap() -> None:
    confidence = np.full(10, 0.9)
    assert metrics.calibration_error(confidence, np.array([1.0] * 6 + [0.0] * 4)) == pytest.approx(0.3)
    assert metrics.calibration_error(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0


def test_the_limit_shrinks_with_the_size_of_the_test_set() -> None:
    confidence = np.random.default_rng(0).uniform(0.3, 1.0, 4_000)
    few, many = metrics.calibrated_limit(confidence[:200]), metrics.calibrated_limit(confidence)
    assert 0.02 < many < 0.05 < few < 0.2


def test_the_limit_holds_for_a_calibrated_model_in_19_of_20_draws() -> None:
    generator = np.random.default_rng(1)
    confidence = generator.uniform(0.3, 1.0, 500)
    limit = metrics.calibrated_limit(confidence)
    errors = [
        metrics.calibration_error(confidence, (generator.random(500) < confidence).astype(float))
        for _ in range(400)
    ]
    assert np.mean(np.array(errors) <= limit) == pytest.approx(0.95, abs=0.03)
