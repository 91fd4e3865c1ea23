"""Agreement with new examples: alarms where labels are wrong, and no more often than promised."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.adaptation.promotion.agreement import against, ask
from adapters.examples.target import Target, Task
from adapters.probe.fit import Dataset, FittedProbe, fit
from adapters.storage.formats import Evidence

LIMIT = 25.0


def stake(agreed: NDArray[np.float64], claim: float) -> NDArray[np.float64]:
    """The stake after each of the looks, ten examples apart, at answers (runs, examples)."""
    count = agreed.shape[1]
    expected, asked = np.full(count, claim, np.float32), np.arange(count) // 10
    return np.array(
        [
            [against(run[:end].astype(np.float32), expected[:end], asked[:end])[0] for end in looks(count)]
            for run in agreed
        ]
    )


def looks(count: int) -> range:
    return range(10, count + 1, 10)


@pytest.mark.parametrize("claim", [0.3, 0.75, 0.95])
def test_true_claims_are_refuted_as_seldom_as_promised(claim: float) -> None:
    random = np.random.default_rng(0)
    agreed = (random.random((400, 200)) < claim).astype(np.float64)
    refuted = (stake(agreed, claim) > LIMIT).any(axis=1).mean()
    # At most one in 25, and the share is known to a hundredth.
    assert refuted <= 0.04 + 0.02


def test_wrong_labels_are_found_whenever_they_begin() -> None:
    random = np.random.default_rng(1)
    for begins in (0, 100):
        right = np.where(np.arange(200) < begins, 0.8, 0.5)
        agreed = (random.random((50, 200)) < right).astype(np.float64)
        found = stake(agreed, 0.8) > LIMIT
        # Within ninety examples, nearly always; before they begin, nearly never.
        assert not begins or found[:, : begins // 10].any(axis=1).mean() <= 0.06
        assert found[:, begins // 10 : begins // 10 + 9].any(axis=1).mean() >= 0.9


def test_it_is_known_since_when() -> None:
    agreed = np.array([1.0] * 60 + [0.0] * 20, np.float32)
    _, since = against(agreed, np.full(80, 0.8, np.float32), np.arange(80) // 10 + 3)
    assert since == 9


def test_the_order_of_what_was_asked_together_does_not_matter() -> None:
    random = np.random.default_rng(2)
    agreed, expected = random.random(30).astype(np.float32), np.full(30, 0.6, np.float32)
    asked = np.arange(30) // 10
    order = random.permutation(30)
    assert against(agreed[order], expected[order], asked[order])[0] == pytest.approx(
        against(agreed, expected, asked)[0]
    )


def taught(task: Task, count: int, seed: int) -> tuple[NDArray[np.float32], list[Target], list[str]]:
    """Inputs with targets that can be learned in part: labels or numbers of a direction, with noise."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(count, 16)).astype(np.float32)
    value = rows[:, 0] + 0.5 * random.normal(size=count)
    targets: list[Target]
    if task == "regression":
        targets = [float(one) for one in value]
    elif task == "classification":
        targets = ["high" if one > 0 else "low" for one in value]
    else:
        targets = [tuple(name for name, there in (("a", one > 0), ("b", one > 1)) if there) for one in value]
    return rows, targets, [f"{seed:032x}{row:032x}" for row in range(count)]


def learned(task: Task, count: int = 120) -> tuple[FittedProbe, Evidence]:
    rows, targets, digests = taught(task, count, 0)
    fitted = fit(Dataset(rows.copy(), targets, digests, task, "f"))
    return fitted, Evidence(tuple(digests), tuple(digests), tuple(targets), fitted.scores)


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_a_version_claims_what_it_keeps_and_no_wrong_example_keeps_it(task: Task) -> None:
    fitted, evidence = learned(task)
    rows, targets, _ = taught(task, 400, 1)
    said = ask(task, fitted.head, evidence, rows, targets)
    assert said is not None
    # One standard error is taken off the claim: it is kept, and not by far.
    assert -0.02 <= said.agreed.mean() - said.expected.mean() <= 0.15
    asked = np.zeros(400, np.int64)
    assert against(said.agreed, said.expected, asked)[0] < LIMIT
    shuffled = [targets[row] for row in np.random.default_rng(2).permutation(400)]
    wrong = ask(task, fitted.head, evidence, rows, shuffled)
    assert wrong is not None
    assert against(wrong.agreed, wrong.expected, asked)[0] > LIMIT


def test_a_hard_label_alone_is_no_reason_for_alarm() -> None:
    """A rare label that is often taken for another: its examples are wrong more often than all are."""
    random = np.random.default_rng(3)

    def draw(count: int, rare: bool, prefix: str) -> tuple[NDArray[np.float32], list[str], list[str]]:
        rows = random.normal(size=(count, 8)).astype(np.float32)
        rows[:, 0] += 1.0 if rare else 0.0
        return rows, ["rare" if rare else "common"] * count, [f"{prefix}{row}" for row in range(count)]

    common, rare = draw(120, False, "c"), draw(30, True, "r")
    rows = np.concatenate([common[0], rare[0]])
    targets, digests = common[1] + rare[1], common[2] + rare[2]
    fitted = fit(Dataset(rows, targets, digests, "classification", "f"))
    evidence = Evidence(tuple(digests), tuple(digests), tuple(targets), fitted.scores)
    more, labels, _ = draw(60, True, "n")
    said = ask("classification", fitted.head, evidence, more, labels)
    assert said is not None
    assert said.agreed.mean() < fitted.report["accuracy"] - 0.2
    assert against(said.agreed, said.expected, np.zeros(60, np.int64))[0] < LIMIT


def test_what_was_not_measured_claims_nothing() -> None:
    rows = np.eye(4, 16, dtype=np.float32)
    labels, digests = ["a", "b", "c", "d"], ["1", "2", "3", "4"]
    fitted = fit(Dataset(rows.copy(), labels, digests, "classification", "f"))
    evidence = Evidence(tuple(digests), tuple(digests), tuple(labels), fitted.scores)
    assert ask("classification", fitted.head, evidence, rows, labels) is None
