"""Labels that are always missed, and the abstention on inputs that may be of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.heads.answers import NO_ALARM, alarmed, nothing
from adapters.probe.calibration.judgement import judge
from adapters.probe.fit import FittedProbe, ProbeConfig, fit
from models.arrays import Floats
from tests.support.models.synthetic_embeddings import clouds, dataset

DIM, LABELS, RARE = 48, 5, "label 4"


def taught(rare: int, seed: int = 0, costs: dict[str, float] | None = None) -> FittedProbe:
    """Five labels, of which the last has this many examples, the others eighty each."""
    rows, names = clouds(80 * LABELS, DIM, LABELS, apart=2.2, seed=seed)
    some = [row for row in range(len(rows)) if names[row] != RARE or row < LABELS * rare]
    return fit(dataset(rows[some], [names[row] for row in some]), ProbeConfig(costs=costs or {}))


def unseen() -> tuple[Floats, NDArray[Any]]:
    rows, names = clouds(4_000, DIM, LABELS, apart=2.2, seed=99)
    return rows, np.array(names)


def codes(fitted: FittedProbe) -> set[str]:
    return {warning["code"] for warning in fitted.report["warnings"]}


def test_a_label_that_was_always_missed_makes_its_neighbours_abstain() -> None:
    """Means of ten heads: far fewer confident wrong answers to its inputs, hardly fewer to others."""
    rows, names = unseen()
    rare = names == RARE
    wrong, kept = [], []
    for seed in range(10):
        fitted = taught(3, seed)
        head, report = fitted.head, fitted.report
        if not len(head.alarms):
            continue
        assert report["per_label"][RARE]["recall"] == 0.0
        assert report["per_label"][RARE]["alarm"] == pytest.approx(head.alarms[-1])
        assert [one["alarm"] for one in report["per_label"].values()].count(None) == LABELS - 1
        assert (head.alarms[:-1] == NO_ALARM).all()
        assert "labels_missed" in codes(fitted)
        found = head.predict(rows)
        right = np.array(head.labels)[found.answers] == names
        assert found.abstained[found.probabilities[:, -1] >= head.alarms[-1]].all()
        silent = (found.confidence < head.threshold) | (found.distance > 1.0)
        wrong.append([(~right & ~quiet)[rare].mean() for quiet in (silent, found.abstained)])
        kept.append([(right & ~quiet)[~rare].mean() for quiet in (silent, found.abstained)])
    assert len(wrong) >= 5
    before, after = np.mean(wrong, axis=0)
    assert after < 0.75 * before
    usual, left = np.mean(kept, axis=0)
    assert left > usual - 0.035


@pytest.mark.parametrize("per_label", [2, 4, 20])
def test_labels_far_apart_raise_none(per_label: int) -> None:
    rows, names = clouds(per_label * LABELS, DIM, LABELS, apart=12.0)
    fitted = fit(dataset(rows, names))
    assert not len(fitted.head.alarms)
    assert "labels_missed" not in codes(fitted)
    assert {one["alarm"] for one in fitted.report["per_label"].values()} == {None}


@pytest.mark.parametrize("noisy", [3, 12])
def test_a_label_of_noise_costs_a_good_adapter_little(noisy: int) -> None:
    """Its examples are drawn from all the others: it cannot be learned, and the others answer as before."""
    rows, names = clouds(80 * LABELS, DIM, LABELS, apart=6.0)
    asked, truth = clouds(3_000, DIM, LABELS, apart=6.0, seed=99)
    before = fit(dataset(rows[noisy:], names[noisy:]))
    after = fit(dataset(rows, ["noise"] * noisy + names[noisy:]))
    assert after.report["per_label"]["noise"]["recall"] == 0.0
    assert "labels_missed" in codes(after)
    shares = []
    for fitted in (before, after):
        found = fitted.head.predict(asked)
        right = np.array(fitted.head.labels)[found.answers] == np.array(truth)
        shares.append((right & ~found.abstained).mean())
    assert shares[1] > shares[0] - 0.06


@pytest.mark.parametrize("labels", [3, 20])
def test_pure_noise_stays_honest(labels: int) -> None:
    """Labels without meaning: the accuracy of chance, and no answers, with or without alarms."""
    generator = np.random.default_rng(5)
    rows = generator.standard_normal((300, DIM)).astype(np.float32)
    fitted = fit(dataset(rows, [f"label {label}" for label in generator.integers(0, labels, 300)]))
    low, high = fitted.report["accuracy_interval"]
    assert low <= 1.0 / labels <= high
    assert fitted.head.predict(generator.standard_normal((500, DIM)).astype(np.float32)).abstained.all()


def test_what_is_answered_is_as_right_as_wanted_with_alarms_in_force() -> None:
    """Means of ten heads, with labels as frequent on new inputs as in the examples."""
    rows, names = unseen()
    weights = np.where(names == RARE, 3.0 / 80.0, 1.0)
    shares, accuracies = [], []
    for seed in range(10):
        head = taught(3, seed).head
        if not len(head.alarms):
            continue
        found = head.predict(rows)
        given = ~found.abstained
        right = np.array(head.labels)[found.answers] == names
        shares.append(weights[given].sum() / weights.sum())
        accuracies.append(np.average(right[given], weights=weights[given]))
    assert len(shares) >= 5
    assert np.mean(shares) > 0.2
    assert np.mean(accuracies) > 0.945


def test_a_cost_that_gets_a_label_answered_ends_its_alarm() -> None:
    assert len(taught(3, 1).head.alarms)
    dear = taught(3, 1, costs={RARE: 100.0})
    assert dear.report["per_label"][RARE]["recall"] > 0.3
    assert not len(dear.head.alarms)


def test_alarms_cost_at_most_their_share_of_the_right_answers() -> None:
    generator = np.random.default_rng(0)
    own = np.array([0, 1] * 500 + [2] * 5)
    chances = np.full((len(own), 3), 0.01, np.float32)
    chances[:, 2] = generator.uniform(0.001, 0.05, len(own))
    chances[np.arange(1_000), own[:1_000]] = 0.99 - chances[:1_000, 2]
    chances[1_000:, 0] = 0.9
    found = judge(chances, own, nothing(), 0.9)
    assert (found.alarms[:2] == NO_ALARM).all()
    lost = alarmed(chances, found.alarms)[:1_000].mean()
    assert 0.02 < lost <= 0.03
    # A single missed example says too little.
    assert not len(judge(chances[:1_001], own[:1_001], nothing(), 0.9).alarms)
    # Where nothing is answered there is nothing to lose, and nothing to avoid.
    assert not len(judge(chances, own, nothing(), 0.9999).alarms)
