"""Reports of heads on synthetic inputs whose truth is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from adapters.examples.target import Task
from benchmarks.honesty.answers import Decisions, Shots, answered, decided
from benchmarks.honesty.bench import WANTED_ACCURACY
from benchmarks.honesty.copies import planted
from benchmarks.honesty.growth import compared, grown, predicted_beside
from benchmarks.honesty.noise import Noise, noise
from benchmarks.honesty.real import after_corrections, with_rare_labels
from benchmarks.honesty.scores import Answers, Claim, Claims, Known, mean
from tests.support.models.synthetic_embeddings import clouds

_TAGS = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of BLAS make thousands of small fits slower, several times."""
    with threadpool_limits(1):
        yield


def _labelled(labels: int, apart: float, *, n: int = 1_500, dim: int = 48) -> Known:
    rows, names = clouds(n, dim, labels, apart=apart, seed=labels)
    return Known("clouds", "classification", rows, np.array(names))


def _tagged() -> Known:
    """Each tag is there where a noisy sum of some numbers of the input is high: a quarter of the inputs."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((1_500, 32), dtype=np.float32)
    sums = rows[:, :8].reshape(-1, len(_TAGS), 2).sum(axis=2) + 0.5 * generator.standard_normal((1_500, 4))
    return Known("sums", "multilabel", rows, sums > 1.0, _TAGS)


def _rated(dim: int = 32) -> Known:
    """Numbers that are half a sum and half noise, far from zero."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((1_500, dim), dtype=np.float32)
    sums = rows @ generator.standard_normal(dim) / np.sqrt(dim)
    return Known("numbers", "regression", rows, 1_000.0 + sums + generator.standard_normal(1_500))


def _known(task: Task) -> Known:
    return {"classification": _labelled(3, 0.8), "multilabel": _tagged(), "regression": _rated()}[task]


def _claims(several: Iterable[list[Claim]]) -> Claims:
    return Claims(tuple(one for claims in several for one in claims))


@pytest.mark.parametrize(
    ("task", "shares"),
    [
        ("classification", (0.5, 0.5)),
        ("classification", (0.2,) * 5),
        ("multilabel", (0.3,) * 5),
        ("regression", ()),
    ],
)
def test_noise_scores_as_noise(task: Task, shares: tuple[float, ...]) -> None:
    cells = [(n, dim) for n in (10, 20, 50) for dim in (16, 384)]
    claims = _claims(noise(Noise(task, n, dim, shares), range(20)) for n, dim in cells)
    assert len(claims.measured) > 80
    # If each of 120 intervals holds with 95 %, a share of 0.90 or less is as rare as one run in a hundred.
    assert claims.coverage >= 0.90
    assert claims.optimism <= 0.05


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_scores_of_what_can_be_learned_are_true(task: Task) -> None:
    known = _known(task)
    claims = []
    for seed in range(30):
        order = np.random.default_rng(seed).permutation(len(known.rows))
        claims.append(after_corrections(known, order, 60, 0, 0).claim)
    assert Claims(tuple(claims)).coverage >= 0.86
    assert abs(Claims(tuple(claims)).optimism) <= 0.06


def test_labels_with_one_example_are_not_left_out_of_the_accuracy() -> None:
    known = _labelled(8, 1.5)
    claims = Claims(tuple(with_rare_labels(known, (10, 10, 1, 1, 1, 1, 1, 1), seed) for seed in range(40)))
    assert claims.coverage >= 0.88
    assert abs(claims.optimism) <= 0.1


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_corrections_alone_do_not_ruin_the_scores(task: Task) -> None:
    """They lie where the examples mislead, so that these look a little worse than they are when held out."""
    known = _known(task)
    claims = []
    for seed in range(15):
        order = np.random.default_rng(seed).permutation(len(known.rows))
        claims.append(after_corrections(known, order, 60, 3, 60).claim)
    assert Claims(tuple(claims)).coverage >= 0.7
    assert -0.15 <= Claims(tuple(claims)).optimism <= 0.05


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_near_copies_do_not_vouch_for_each_other(task: Task) -> None:
    """Half of the examples are copies, and with coin flips nothing else can be learned."""
    rows = np.random.default_rng(0).standard_normal((600, 128), dtype=np.float32)
    targets = {
        "classification": np.zeros(600, dtype=np.str_),
        "multilabel": np.zeros((600, 2), dtype=np.bool_),
        "regression": np.zeros(600),
    }
    known = Known("copied", task, rows, targets[task])
    copies = rows[None, :200] + 0.02 * np.random.default_rng(1).standard_normal(
        (1, 200, 128), dtype=np.float32
    )
    claims = Claims(tuple(planted(known, copies, 0.5, True, seed) for seed in range(25)))
    assert abs(claims.optimism) <= 0.08
    assert claims.coverage >= 0.86


def test_most_of_what_is_answered_is_right_and_most_that_could_be_is_answered() -> None:
    known = _labelled(6, 1.3)
    each = []
    for examples in (5, 10, 20):
        each += [answered(known, *Shots("", examples).split(known, seed)) for seed in range(8)]
    joined = Answers.joined(each)
    assert joined.accuracy_answered >= 0.90
    hindsight = mean([one.coverage_in_hindsight(WANTED_ACCURACY) for one in each])
    assert joined.coverage >= 0.75 * hindsight
    assert joined.calibration_error <= 0.06


def test_most_decisions_on_tags_that_are_certain_are_right() -> None:
    known = _tagged()
    each = []
    for seed in range(8):
        order = np.random.default_rng(seed).permutation(len(known.rows))
        each.append(decided(known, order[:100], order[100:]))
    joined = Decisions.joined(each)
    assert joined.accuracy_certain >= 0.93
    assert joined.coverage >= 0.75 * mean([one.coverage_in_hindsight(WANTED_ACCURACY) for one in each])


def test_one_more_right_example_makes_no_adapter_worse() -> None:
    known = _labelled(6, 1.3)
    each = [grown(known, 6, 30, seed) for seed in range(12)]
    balanced = np.mean([one.balanced for one in each], axis=0)
    assert (np.maximum.accumulate(balanced) - balanced).max() <= 0.06
    assert np.mean([one.confidence - one.accuracy for one in each], axis=0).max() <= 0.15
    assert balanced[-1] > balanced[0] + 0.1
    assert not any(one.constant for one in each)
    assert sum(one.sure_wrong for one in each) <= 0.01 * sum(one.sure for one in each)


def test_a_few_examples_of_two_labels_do_as_well_as_in_scikit_learn() -> None:
    known = _labelled(2, 0.6)
    each = [
        compared(known, *Shots("", examples).split(known, seed))
        for examples in (2, 3, 4, 8)
        for seed in range(8)
    ]
    assert not any(one.constant for one in each)
    assert mean([one.accuracy - one.plain_accuracy for one in each]) >= -0.015
    assert mean([one.loss - one.cross_validated_loss for one in each]) <= 0.02
    assert sum(one.sure_wrong for one in each) <= 0.01 * sum(one.sure for one in each)


@pytest.mark.parametrize("dim", [32, 200])
def test_numbers_are_predicted_as_well_as_by_scikit_learn(dim: int) -> None:
    known = _rated(dim)
    for n in (20, 60, 250):
        pairs = []
        for seed in range(8):
            order = np.random.default_rng(seed).permutation(len(known.rows))
            pairs.append(predicted_beside(known, order[:n], order[n:]))
        assert mean([ours - theirs for ours, theirs in pairs]) >= -0.03
