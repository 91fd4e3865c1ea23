"""Regression: left-out errors beside scikit-learn's refits, and reports beside known truths."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import Ridge, RidgeCV

from adapters.probe.fit import Dataset, FittedProbe, fit
from adapters.probe.solvers import leverage
from adapters.probe.solvers.leverage import left_out, spectrum_of
from models.arrays import Doubles
from tests.support.models.synthetic_embeddings import permuted

STRENGTHS = 10.0 ** np.arange(-4.0, 4.25, 1.0)


def regression(
    rows: NDArray[np.floating],
    targets: Doubles,
    groups: Sequence[str] = (),
    sampled: Sequence[bool] = (),
) -> Dataset:
    digests = [f"{row:064x}" for row in range(len(rows))]
    return Dataset(
        rows.astype(np.float32), targets.tolist(), digests, "regression", "f", groups=groups, sampled=sampled
    )


def spectral(generator: np.random.Generator, n: int, dim: int) -> Doubles:
    """Rows whose variances decay as those of embeddings do."""
    return generator.standard_normal((n, dim)) * np.arange(1.0, dim + 1.0) ** -0.7


def linear(seed: int, n: int, dim: int, share: float) -> tuple[Doubles, Doubles]:
    """Rows and targets of unit variance, of which the rows explain a share."""
    rows = spectral(np.random.default_rng(seed), n, dim)
    slopes = np.random.default_rng(1_000 + dim).standard_normal(dim)
    signal = rows @ slopes / np.sqrt(np.sum((slopes * np.arange(1.0, dim + 1.0) ** -0.7) ** 2))
    noise = np.random.default_rng(2_000 + seed).standard_normal(n)
    return rows, np.sqrt(share) * signal + np.sqrt(1.0 - share) * noise


def values(fitted: FittedProbe, rows: NDArray[np.floating]) -> Doubles:
    found = fitted.head.predict(rows.astype(np.float32)).values
    assert found is not None
    return found


def explained(predicted: Doubles, targets: Doubles) -> float:
    return float(1.0 - np.mean((targets - predicted) ** 2) / np.var(targets))


def refitted(rows: Doubles, targets: Doubles, groups: NDArray[np.int64], strength: float) -> Doubles:
    """Errors of scikit-learn's ridge regression, fitted once for every group without it."""
    errors = np.empty(len(targets))
    for group in np.unique(groups):
        own = groups == group
        model = Ridge(alpha=strength, solver="svd").fit(rows[~own], targets[~own])
        errors[own] = targets[own] - model.predict(rows[own])
    return errors


@pytest.mark.parametrize("kept", [0, 1 << 20])
@pytest.mark.parametrize("kind", ["single", "groups", "copies"])
@pytest.mark.parametrize(("n", "dim"), [(12, 40), (40, 12), (30, 29), (30, 30)])
def test_errors_on_groups_left_out_are_those_of_refits(n: int, dim: int, kind: str, kept: int) -> None:
    """At the weakest strength too, where nearly all of a row comes from itself."""
    generator = np.random.default_rng(n + dim)
    rows = (generator.standard_normal((n, dim)) + 0.3).astype(np.float32)
    targets = generator.standard_normal(n)
    groups = np.arange(n) if kind == "single" else generator.integers(0, n // 2, n)
    if kind == "copies":
        rows = rows[groups]
    spectrum = spectrum_of(rows, kept)
    found = left_out(spectrum, targets, STRENGTHS, groups, np.ones(n, np.bool_), np.zeros(n, np.int64))
    assert found.folds == 0
    weights, intercepts = spectrum.weights(targets, STRENGTHS)
    for place, strength in enumerate(STRENGTHS):
        expected = refitted(rows.astype(np.float64), targets, groups, strength)
        assert found.errors[:, place] == pytest.approx(expected, rel=1e-7, abs=1e-7)
        model = Ridge(alpha=strength, solver="svd").fit(rows.astype(np.float64), targets)
        assert weights[:, place] == pytest.approx(model.coef_, rel=1e-7, abs=1e-9)
        assert intercepts[place] == pytest.approx(model.intercept_, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize(("n", "dim"), [(40, 50), (60, 15)])
def test_large_groups_are_left_out_in_folds_as_exactly(
    n: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leverage, "_CHEAP_SYSTEMS", 0.0)
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((n, dim)).astype(np.float32)
    targets = generator.standard_normal(n)
    groups = np.arange(n) % 4
    found = left_out(spectrum_of(rows), targets, STRENGTHS, groups, np.ones(n, np.bool_), groups)
    assert found.folds == 4
    for place, strength in enumerate(STRENGTHS):
        expected = refitted(rows.astype(np.float64), targets, groups, strength)
        assert found.errors[:, place] == pytest.approx(expected, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize(("n", "dim"), [(24, 60), (50, 12)])
def test_changes_say_what_the_errors_would_be_without_a_group(n: int, dim: int) -> None:
    rows, targets = linear(3, n, dim, 0.5)
    rows = rows.astype(np.float32).astype(np.float64)
    groups = np.arange(n) // 2
    everything = np.ones(n, np.bool_)
    found = left_out(spectrum_of(rows.astype(np.float32)), targets, np.ones(1), groups, everything, groups)
    before = float((found.errors**2).sum())
    expected, estimated = [], []
    for group in range(n // 2):
        rest = groups != group
        after = float((refitted(rows[rest], targets[rest], groups[rest], 1.0) ** 2).sum())
        expected.append(after - before)
        estimated.append(float(found.changes[~rest].sum()))
    assert np.corrcoef(expected, estimated)[0, 1] > 0.98
    assert np.std(estimated) == pytest.approx(np.std(expected), rel=0.15)


@pytest.mark.parametrize(("n", "dim"), [(10, 384), (20, 16), (20, 64), (50, 16), (60, 384)])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_interval_holds_the_truth(n: int, dim: int, share: float) -> None:
    """Targets that are noise, and targets of which embeddings explain half."""
    held, gaps = [], []
    for seed in range(60):
        rows, targets = linear(seed, n + 600, dim, share)
        fitted = fit(regression(rows[:n], targets[:n]))
        truth = explained(values(fitted, rows[n:]), targets[n:])
        low, high = fitted.report["r2_interval"]
        held.append(low <= truth <= high)
        gaps.append(fitted.report["r2"] - truth)
    assert np.mean(held) >= 0.93
    assert abs(np.median(gaps)) < 1.0 / np.sqrt(n)


@pytest.mark.parametrize("dim", [60, 120, 384])
def test_noise_scores_as_noise(dim: int) -> None:
    """Noise scores as noise with more examples than dimensions, as many, and fewer."""
    generator = np.random.default_rng(0)
    report = fit(regression(generator.standard_normal((120, dim)), generator.standard_normal(120))).report
    assert -0.1 < report["r2"] < 0.05
    assert [warning["code"] for warning in report["warnings"]] == ["no_better_than_mean"]


def test_copies_do_not_vouch_for_each_other() -> None:
    """Every input twice with one target: noise, though each is easily told from its copy."""
    generator = np.random.default_rng(0)
    rows = np.repeat(generator.standard_normal((60, 200)), 2, axis=0)
    data = regression(
        rows, np.repeat(generator.standard_normal(60), 2), [str(row // 2) for row in range(120)]
    )
    report = fit(data).report
    assert report["method"] == "leave-one-group-out"
    assert report["r2"] < 0.1
    assert report["r2_interval"][0] < 0.0


def test_is_no_worse_than_scikit_learn() -> None:
    for n, dim in ((10, 200), (20, 64), (50, 200), (200, 64)):
        ours, theirs = [], []
        for seed in range(20):
            rows, targets = linear(seed, n + 600, dim, 0.6)
            fitted = fit(regression(rows[:n], targets[:n]))
            ours.append(explained(values(fitted, rows[n:]), targets[n:]))
            model = RidgeCV(np.logspace(-3, 3, 13)).fit(rows[:n], targets[:n])
            theirs.append(explained(model.predict(rows[n:]), targets[n:]))
        assert np.mean(ours) > np.mean(theirs) - 0.02


def test_r2_rmse_and_scores_are_of_the_same_errors() -> None:
    rows, targets = linear(0, 80, 32, 0.5)
    fitted = fit(regression(rows, 7.0 + 3.0 * targets))
    report = json.loads(json.dumps(fitted.report, allow_nan=False))
    assert report["method"] == "leave-one-out"
    assert report["rmse"] == fitted.head.residual_deviation
    assert report["rmse"] ** 2 == pytest.approx(-np.mean(fitted.scores), rel=1e-5)
    assert report["r2"] == pytest.approx(1.0 - report["rmse"] ** 2 / np.var(3.0 * targets, ddof=1))
    low, high = report["r2_interval"]
    assert low < report["r2"] < high
    assert report["warnings"] == ([] if low > 0.0 else report["warnings"])


def test_what_was_not_sampled_is_learned_from_and_not_measured() -> None:
    """As many examples again, chosen because they are far off."""
    rows, targets = linear(0, 240, 16, 0.6)
    targets[120:] += 4.0
    mixed = fit(regression(rows, targets, sampled=[row < 120 for row in range(240)]))
    assert np.isfinite(mixed.scores[:120]).all()
    assert np.isnan(mixed.scores[120:]).all()
    assert mixed.report["rmse"] ** 2 == pytest.approx(-np.mean(mixed.scores[:120]), rel=1e-5)
    alone = fit(regression(rows[:120], targets[:120]))
    assert values(mixed, rows).mean() > values(alone, rows).mean() + 1.0


def test_the_same_examples_in_any_order_give_the_same_bytes() -> None:
    rows, targets = linear(1, 90, 48, 0.5)
    targets[7] = 40.0
    data = regression(rows, targets)
    order = np.random.default_rng(0).permutation(90)
    first, again = fit(data), fit(permuted(data, order))
    assert again.head.to_bytes() == first.head.to_bytes()
    assert np.array_equal(again.scores, first.scores[order])
    assert [order[one["index"]] for one in again.report["suspects"]] == [7]


@pytest.mark.parametrize(("n", "groups"), [(2, ()), (60, ["a"] * 30 + ["b"] * 30)])
def test_two_groups_measure_nothing_and_the_head_abstains(n: int, groups: Sequence[str]) -> None:
    rows, targets = linear(0, n, 8, 0.5)
    fitted = fit(regression(rows, targets, groups))
    assert [fitted.report[name] for name in ("r2", "r2_interval", "rmse")] == [None] * 3
    assert fitted.report["method"] == "not measured"
    assert np.isnan(fitted.scores).all()
    assert not fitted.head.measured
    assert fitted.head.predict(rows.astype(np.float32)).abstained.all()


@pytest.mark.parametrize(
    "case", ["three", "one differs", "constant rows", "zero rows", "contradictions", "exact"]
)
def test_odd_examples_are_reported_finitely(case: str) -> None:
    generator = np.random.default_rng(0)
    rows, targets = generator.standard_normal((60, 24)), generator.standard_normal(60)
    if case == "three":
        rows, targets = rows[:3], np.array([0.0, 0.0, 1.0])
    elif case == "one differs":
        targets = np.zeros(60)
        targets[11] = 1.0
    elif case == "constant rows":
        rows[:] = 1.0
    elif case == "zero rows":
        rows[:] = 0.0
    elif case == "contradictions":
        rows = np.repeat(rows[:30], 2, axis=0)
    else:
        targets = rows @ np.arange(24.0)
    fitted = fit(regression(rows, targets))
    report = json.loads(json.dumps(fitted.report, allow_nan=False))
    assert np.isfinite(values(fitted, rows)).all()
    if case in ("constant rows", "zero rows"):
        # All inputs are copies of one, and copies do not judge each other.
        assert (report["r2"], report["r2_interval"], fitted.head.measured) == (None, None, False)
        assert [warning["code"] for warning in report["warnings"]] == ["not_measured"]
        return
    low, high = report["r2_interval"]
    assert low <= report["r2"] <= high
    assert (report["r2"] > 0.999) == (case == "exact")
    assert bool(report["warnings"]) == (case != "exact")
    assert [one["index"] for one in report["suspects"]] == ([11] if case == "one differs" else [])


@pytest.mark.parametrize("wrong", [100.0, 10_000.0])
def test_a_mistyped_number_is_named_first(wrong: float) -> None:
    rows, targets = linear(0, 60, 384, 0.8)
    clean = fit(regression(rows, targets)).report
    assert clean["suspects"] == []
    assert clean["suspects_total"] == 0
    targets[17] += wrong
    report = fit(regression(rows, targets)).report
    assert report["r2"] < 0.1
    assert [warning["code"] for warning in report["warnings"]] == ["no_better_than_mean"]
    first = report["suspects"][0]
    assert (first["index"], first["target"]) == (17, targets[17])
    assert abs(first["looks_like"]) < 0.1 * wrong
    assert first["deviations"] > 20.0


def test_many_suspects_are_counted_and_the_worst_listed() -> None:
    rows, targets = linear(0, 600, 16, 0.9)
    targets[::10] += np.linspace(30.0, 60.0, 60)
    report = fit(regression(rows, targets)).report
    assert report["suspects_total"] == 60
    assert len(report["suspects"]) == 50
    assert {one["index"] % 10 for one in report["suspects"]} == {0}


@pytest.mark.parametrize(
    ("origin", "unit"), [(1.7e9, 1.0), (1e9, 1e-3), (0.0, 1e29), (0.0, 1e-30), (-1e15, 100.0)]
)
def test_targets_of_any_size_keep_their_differences(origin: float, unit: float) -> None:
    rows, targets = linear(0, 80, 16, 0.9)
    plain = fit(regression(rows, targets))
    moved = fit(regression(rows, origin + unit * targets))
    coarse = np.finfo(np.float64).eps * abs(origin) / unit
    assert (values(moved, rows) - origin) / unit == pytest.approx(
        values(plain, rows), abs=1e-5 + 4.0 * coarse
    )
    assert moved.report["r2"] == pytest.approx(plain.report["r2"], abs=1e-3)
    assert moved.report["rmse"] == pytest.approx(plain.report["rmse"] * unit, rel=1e-3)
    assert np.isfinite(moved.scores).all()
