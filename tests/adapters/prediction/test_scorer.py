"""Heads on embeddings: who comes together shares a pass, and nothing else."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from adapters.heads.abstention import AbstentionRule
from adapters.heads.answers import Predictions
from adapters.heads.head import Head
from adapters.heads.novelty import fit_region
from adapters.heads.scaling import Scaling
from adapters.prediction.scorer import HeadScorer, Prediction, shape

pytestmark = pytest.mark.anyio

DIM = 8
LABELS = ("a", "b", "c")


def head(seed: int) -> Head:
    rng = np.random.default_rng(seed)
    return Head(
        task="classification",
        fingerprint="f",
        labels=tuple(f"{seed}-{label}" for label in LABELS),
        scaling=Scaling("none", np.zeros(DIM, np.float32), 1.0),
        weight=rng.normal(size=(len(LABELS), DIM)).astype(np.float32),
        bias=rng.normal(size=len(LABELS)).astype(np.float32),
    )


def rows(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)


async def test_a_pass_for_each_head_whoever_asks() -> None:
    passes: list[float] = []
    scorer = HeadScorer(passes.append)
    heads = [head(seed) for seed in range(3)]
    calls = [(heads[number % 3], rows(number, 1 + number % 4), 1 + number % 2) for number in range(60)]
    alone = [await scorer.answer(*call) for call in calls]
    assert len(passes) == len(calls)
    passes.clear()
    together = await asyncio.gather(*(scorer.answer(*call) for call in calls))
    assert len(passes) == 6  # three heads, each with two values of top_k
    for (one, embeddings, top_k), expected, found in zip(calls, alone, together, strict=True):
        assert len(found) == len(embeddings)
        for prediction, same in zip(found, expected, strict=True):
            assert prediction.label in one.labels
            assert prediction.label == same.label
            assert len(prediction.probabilities) == top_k
            assert prediction.confidence == pytest.approx(same.confidence, abs=1e-5)


async def test_who_wakes_alone_is_answered_at_once_and_joins_those_who_wait() -> None:
    passes: list[float] = []
    scorer = HeadScorer(passes.append)
    one = head(0)

    async def ask(*, alone: bool) -> None:
        await scorer.answer(one, rows(0, 1), 1, alone=alone)

    asking = ask(alone=True)
    with pytest.raises(StopIteration):
        asking.send(None)
    assert len(passes) == 1
    await asyncio.gather(ask(alone=False), ask(alone=True), ask(alone=True))
    assert len(passes) == 2


async def test_a_head_that_fails_fails_alone() -> None:
    scorer = HeadScorer(lambda seconds: None)
    broken = replace(head(1), weight=np.zeros((3, DIM + 1), np.float32))
    results = await asyncio.gather(
        scorer.answer(head(0), rows(0, 2), 1),
        scorer.answer(broken, rows(1, 2), 1),
        scorer.answer(broken, rows(2, 2), 1),
        return_exceptions=True,
    )
    assert [type(one) for one in results] == [list, ValueError, ValueError]
    assert isinstance((await scorer.answer(head(0), rows(0, 1), 1))[0], Prediction)


async def test_a_caller_who_has_gone_takes_nobody_along() -> None:
    scorer = HeadScorer(lambda seconds: None)
    one = head(0)
    tasks = [asyncio.create_task(scorer.answer(one, rows(seed, 2), 1)) for seed in range(3)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[1], asyncio.CancelledError)
    assert [len(found) for found in (results[0], results[2]) if isinstance(found, list)] == [2, 2]


def sure(scale: float) -> Head:
    """A head of three labels whose logits are this large."""
    made = head(0)
    return replace(made, weight=made.weight * np.float32(scale), bias=made.bias * np.float32(scale))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
def test_probabilities_have_six_digits_and_are_never_certain(scale: float) -> None:
    made = sure(scale)
    for one in shape(made, made.predict(rows(1, 20)), 3):
        chances = [one.confidence, *(chance for _, chance in one.probabilities)]
        assert all(0.000001 <= chance <= 0.999999 for chance in chances)
        assert all(chance == round(chance, 6) for chance in chances)
        if scale == 1e3:
            assert one.confidence == 0.999999
            assert one.probabilities[-1][1] == 0.000001


def test_why_an_answer_is_abstained_in_the_order_of_reasons() -> None:
    embeddings = rows(2, 60)
    targets = np.arange(60) % 3
    region = fit_region(embeddings, targets, np.arange(60) % 5, 2)
    assert region is not None
    near, far = embeddings[0], embeddings[0] + 100
    wary = np.zeros(3, dtype=np.float32)
    confident, doubtful = sure(1.0), replace(sure(1.0), doubt=AbstentionRule(1.1))
    cases = [
        (replace(confident, region=region), near, None),
        (replace(doubtful, region=region), near, "low_confidence"),
        (replace(confident, region=region), far, "far_from_examples"),
        (replace(doubtful, region=region), far, "far_from_examples"),
        (replace(doubtful, region=region, measured=False), far, "not_measured"),
        (replace(confident, measured=False), near, "not_measured"),
        (replace(confident, region=region, alarms=wary), near, "missed_label"),
        (replace(doubtful, region=region, alarms=wary), near, "low_confidence"),
        (replace(confident, region=region, alarms=wary), far, "far_from_examples"),
        (replace(confident, alarms=wary + 1.0), near, None),
    ]
    for one, embedding, reason in cases:
        (found,) = shape(one, one.predict(embedding[None]), 3)
        assert (found.abstention_reason, found.abstained) == (reason, reason is not None)


def test_the_label_is_the_one_that_is_worst_to_miss() -> None:
    embeddings = rows(3, 40)
    plain = sure(0.1)
    dear = replace(plain, costs=np.array([1.0, 1.0, 1.5], np.float32))
    before, after = (shape(one, one.predict(embeddings), 3) for one in (plain, dear))
    for one, other in zip(before, after, strict=True):
        chances = dict(other.probabilities)
        assert chances == dict(one.probabilities)
        assert one.label == one.probabilities[0][0]
        worst = {label: chances[label] * cost for label, cost in zip(dear.labels, dear.costs, strict=True)}
        assert other.label == max(worst, key=worst.__getitem__)
        assert other.confidence == chances[other.label]
    moved = [one.label != other.label for one, other in zip(before, after, strict=True)]
    assert any(moved)
    assert not all(moved)
    # The answer is not among the most probable ones that are listed.
    assert any(one.label != one.probabilities[0][0] for one in shape(dear, dear.predict(embeddings), 1))


def multilabel() -> tuple[Head, Predictions]:
    """Five labels, and what was found for one input: b and d are given; a, d and e are uncertain."""
    made = replace(
        head(0),
        task="multilabel",
        labels=tuple("abcde"),
        weight=np.zeros((5, DIM), np.float32),
        bias=np.zeros(5, np.float32),
        decisions=np.full(5, 0.5, np.float32),
    )
    found = Predictions(
        probabilities=np.array([[0.4, 0.9, 0.1, 0.6, 0.3]], np.float32),
        confidence=np.array([0.6], np.float32),
        distance=np.zeros(1, np.float32),
        abstention_score=np.zeros(1, np.float32),
        abstained=np.zeros(1, np.bool_),
        assigned=np.array([[False, True, False, True, False]]),
        uncertain=np.array([[True, False, False, True, True]]),
    )
    return made, found


def test_uncertain_are_labels_of_the_answer() -> None:
    made, found = multilabel()
    for top_k, uncertain in [(1, ("d",)), (3, ("a", "d")), (5, ("a", "d", "e"))]:
        (one,) = shape(made, found, top_k)
        assert (one.labels, one.uncertain, one.abstention_reason) == (("b", "d"), uncertain, None)
    (one,) = shape(made, replace(found, abstained=np.ones(1, np.bool_)), 3)
    assert one.abstention_reason == "low_confidence"


def test_a_point_in_time_keeps_its_differences() -> None:
    made = replace(
        head(0),
        task="regression",
        labels=(),
        weight=np.eye(1, DIM, dtype=np.float32),
        bias=np.zeros(1, np.float32),
        value_mean=1_700_000_000.0,
        value_scale=1.0,
    )
    embeddings = np.zeros((2, DIM), np.float32)
    embeddings[:, 0] = 0.25, 0.75
    first, second = (one.value for one in shape(made, made.predict(embeddings), 3))
    assert (first, second) == (1_700_000_000.25, 1_700_000_000.75)
