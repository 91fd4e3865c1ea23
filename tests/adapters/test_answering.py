"""Heads on embeddings: who comes together shares a pass, and nothing else."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from adapters.answering import Answering, Prediction
from adapters.features import Scaling
from adapters.head import Head

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
    answering = Answering(passes.append)
    heads = [head(seed) for seed in range(3)]
    calls = [(heads[number % 3], rows(number, 1 + number % 4), 1 + number % 2) for number in range(60)]
    alone = [await answering.answer(*call) for call in calls]
    assert len(passes) == len(calls)
    passes.clear()
    together = await asyncio.gather(*(answering.answer(*call) for call in calls))
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
    answering = Answering(passes.append)
    one = head(0)

    async def ask(*, alone: bool) -> None:
        await answering.answer(one, rows(0, 1), 1, alone=alone)

    asking = ask(alone=True)
    with pytest.raises(StopIteration):
        asking.send(None)
    assert len(passes) == 1
    await asyncio.gather(ask(alone=False), ask(alone=True), ask(alone=True))
    assert len(passes) == 2


async def test_a_head_that_fails_fails_alone() -> None:
    answering = Answering(lambda seconds: None)
    broken = replace(head(1), weight=np.zeros((3, DIM + 1), np.float32))
    results = await asyncio.gather(
        answering.answer(head(0), rows(0, 2), 1),
        answering.answer(broken, rows(1, 2), 1),
        answering.answer(broken, rows(2, 2), 1),
        return_exceptions=True,
    )
    assert [type(one) for one in results] == [list, ValueError, ValueError]
    assert isinstance((await answering.answer(head(0), rows(0, 1), 1))[0], Prediction)


async def test_a_caller_who_has_gone_takes_nobody_along() -> None:
    answering = Answering(lambda seconds: None)
    one = head(0)
    tasks = [asyncio.create_task(answering.answer(one, rows(seed, 2), 1)) for seed in range(3)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[1], asyncio.CancelledError)
    assert [len(found) for found in (results[0], results[2]) if isinstance(found, list)] == [2, 2]
