"""Stalls, and what only looks like one, with real threads and a fake clock."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.backbone import Backbone
from models.batching.batcher import Batcher
from models.batching.request import BatcherClosed
from models.batching.stall_detector import StallDetector
from models.batching.worker_progress import WorkerProgress
from models.runtime.progress import LONGEST_RUN, PATIENCE
from tests.support.models import tiny_backbones

pytestmark = pytest.mark.anyio


class Held:
    """A session whose runs wait until the test lets them go on."""

    def __init__(self, session: Any) -> None:
        self.going = threading.Event()
        self.reached = threading.Semaphore(0)
        self._session = session
        self.crew = session.crew

    def run(self, *arguments: Any) -> Any:
        """As the session does it, later."""
        self.reached.release()
        assert self.going.wait(30)
        return self._session.run(*arguments)


class Holding:
    """Holds threads where they report what they took: busy and without CPU time, or with it."""

    def __init__(self, busy: bool) -> None:
        self.going = threading.Event()
        self.reached = threading.Semaphore(0)
        self._busy = busy

    def observe(self, stage: str, seconds: float) -> None:
        if stage == "queue":
            self.reached.release()
            while not self.going.wait(0.0 if self._busy else 30.0):
                pass


@pytest.fixture
def backbone(tmp_path: Path) -> Backbone:
    return tiny_backbones.text_backbone(tmp_path)


@pytest.fixture
def held(backbone: Backbone) -> Iterator[Held]:
    held = Held(backbone._session)
    backbone._session = backbone._beside = held
    yield held
    held.going.set()


async def reach(reached: threading.Semaphore) -> None:
    assert await asyncio.to_thread(reached.acquire, timeout=30)


async def test_a_run_that_does_not_return_is_stuck(backbone: Backbone, held: Held) -> None:
    batcher = Batcher(backbone, max_queue=100, workers=2)
    await batcher.start()
    standstill = StallDetector(batcher)
    for _ in range(100):
        assert standstill.look(1.0) is None
    caller = asyncio.create_task(batcher.embed([tiny_backbones.sentence(1)]))
    await reach(held.reached)
    assert standstill.look(1.0) is None
    assert standstill.look(PATIENCE) is None
    assert standstill.quiet == PATIENCE
    found = standstill.look(0.1)
    assert found is not None
    assert found.startswith("a run has not returned for 4.6")
    # Progress of another worker changes nothing: this one's caller waits.
    held.going.set()
    await batcher.embed([tiny_backbones.sentence(2)])
    await caller
    assert standstill.look(0.1) is None
    assert standstill.quiet == 0.0
    await batcher.close()


async def test_a_large_run_may_take_what_it_costs(backbone: Backbone, held: Held) -> None:
    backbone.pace = 0.1
    batcher = Batcher(backbone, max_queue=100, workers=1)
    await batcher.start()
    standstill = StallDetector(batcher)
    caller = asyncio.create_task(batcher.embed([tiny_backbones.sentence(1)]))
    await reach(held.reached)
    assert standstill.look(0.1) is None
    # Eight words and two tokens around them, ten times.
    assert standstill.look(9.9) is None
    assert standstill.quiet > PATIENCE
    assert standstill.look(0.2) is not None
    held.going.set()
    await caller
    await batcher.close()


@pytest.mark.parametrize("busy", [False, True])
async def test_who_prepares_is_stuck_only_without_cpu_time(backbone: Backbone, busy: bool) -> None:
    """CPU time excuses a run for a minute at most: an endless loop uses the CPU too."""
    holding = Holding(busy)
    batcher = Batcher(backbone, max_queue=100, workers=1, observe=holding.observe)
    await batcher.start()
    standstill = StallDetector(batcher)
    caller = asyncio.create_task(batcher.embed([tiny_backbones.sentence(1)]))
    await reach(holding.reached)
    standstill.look(0.0)
    verdicts = []
    for _ in range(int(LONGEST_RUN) + 2):
        await asyncio.sleep(0.02)
        verdicts.append(standstill.look(1.0))
    first = next(number for number, verdict in enumerate(verdicts) if verdict is not None)
    assert first == (60 if busy else 4)
    holding.going.set()
    await caller
    await batcher.close()


class Unending:
    """In place of a backbone's preprocessing: does not get done with one input until the test lets it."""

    def __init__(self, backbone: Backbone, item: str) -> None:
        self.going = threading.Event()
        self.reached = threading.Semaphore(0)
        self._prepare = backbone.prepare
        self._item = item
        backbone.prepare = self  # type: ignore[method-assign, assignment]

    def __call__(self, item: bytes | str, waiting: Callable[[bool], None]) -> Any:
        """As the backbone prepares it, the one input later."""
        if item == self._item:
            self.reached.release()
            assert self.going.wait(30)
        return self._prepare(item, waiting)


async def test_an_input_whose_preparation_does_not_end_is_refused_alone(backbone: Backbone) -> None:
    """The network goes on, with the thread's other inputs and with what comes later."""
    texts = [tiny_backbones.sentence(number) for number in range(4)]
    alone = backbone.embed(texts).embeddings
    unending = Unending(backbone, texts[1])
    batcher = Batcher(backbone, max_queue=100, workers=1)
    await batcher.start()
    standstill = StallDetector(batcher)
    threads = batcher.threads_left
    caller = asyncio.create_task(batcher.embed(texts[:3]))
    await reach(unending.reached)
    standstill.look(0.0)
    assert standstill.look(PATIENCE) is None
    assert not caller.done()
    assert standstill.look(0.1) is None
    found = await asyncio.wait_for(caller, 5)
    assert {place: error.code for place, error in found.errors.items()} == {1: "input_too_costly"}
    np.testing.assert_allclose(found.embeddings[[0, 2]], alone[[0, 2]], atol=1e-5)
    later = await asyncio.wait_for(batcher.embed(texts[2:]), 5)
    np.testing.assert_allclose(later.embeddings, alone[2:], atol=1e-5)
    assert batcher.alive
    assert batcher.threads_left == threads + 1
    # The thread that was late finds that its turn is another's, and changes nothing.
    unending.going.set()
    await asyncio.to_thread(batcher._left[0].join, 5)
    later = await asyncio.wait_for(batcher.embed(texts[1:]), 5)
    np.testing.assert_allclose(later.embeddings, alone[1:], atol=1e-5)
    assert standstill.look(0.1) is None
    assert standstill.quiet == 0.0
    await batcher.close()


async def test_too_many_unending_preparations_are_replaced_with_their_backbone(backbone: Backbone) -> None:
    unending = Unending(backbone, "ba")
    batcher = Batcher(backbone, max_queue=100, workers=1)
    await batcher.start()
    standstill = StallDetector(batcher)
    verdicts = []
    for _ in range(4):
        caller = asyncio.create_task(batcher.embed(["ba"]))
        await reach(unending.reached)
        standstill.look(0.0)
        verdicts.append(standstill.look(2 * PATIENCE))
        if verdicts[-1] is None:
            assert list((await caller).errors) == [0]
    assert verdicts[:3] == [None] * 3
    assert verdicts[3] is not None
    batcher.abandon()
    with pytest.raises(BatcherClosed):
        await caller
    unending.going.set()
    await batcher.close()


async def test_who_waits_for_another_process_is_not_stuck(backbone: Backbone) -> None:
    """Its wait has a bound there."""
    unending = Unending(backbone, "ba")
    batcher = Batcher(backbone, max_queue=100, workers=1)
    await batcher.start()
    standstill = StallDetector(batcher)
    caller = asyncio.create_task(batcher.embed(["ba"]))
    await reach(unending.reached)
    (worker,) = [one for one in batcher.progress if one.busy]
    assert isinstance(worker, WorkerProgress)
    worker.wait(True)
    for _ in range(100):
        assert standstill.look(PATIENCE) is None
    assert standstill.quiet == 0.0
    worker.wait(False)
    unending.going.set()
    assert not (await caller).errors
    await batcher.close()


async def test_a_dead_thread_is_noticed(backbone: Backbone) -> None:
    def observe(stage: str, seconds: float) -> None:
        raise SystemExit

    batcher = Batcher(backbone, max_queue=100, workers=1, observe=observe)
    await batcher.start()
    standstill = StallDetector(batcher)
    with pytest.raises(BatcherClosed):
        await batcher.embed([tiny_backbones.sentence(1)])
    assert standstill.look(0.1) == "one of its threads died"
    await batcher.close()


async def test_bulk_that_waits_for_predicts_is_not_stuck(backbone: Backbone, held: Held) -> None:
    batcher = Batcher(backbone, max_queue=100, workers=1)
    await batcher.start()
    standstill = StallDetector(batcher)
    predicts = [asyncio.create_task(batcher.embed([tiny_backbones.sentence(1)]))]
    await reach(held.reached)
    predicts.append(asyncio.create_task(batcher.embed([tiny_backbones.sentence(2)])))
    bulk = asyncio.create_task(batcher.embed([tiny_backbones.sentence(3)], bulk=True))
    await asyncio.sleep(0)
    assert batcher.waiting == (1, 1)
    assert standstill.look(1.0) is None
    assert standstill.look(PATIENCE) is None
    held.going.set()
    await asyncio.gather(*predicts, bulk)
    await batcher.close()


async def test_whom_nobody_waits_for_is_abandoned_at_once(backbone: Backbone, held: Held) -> None:
    batcher = Batcher(backbone, max_queue=100, workers=2)
    await batcher.start()
    callers = [asyncio.create_task(batcher.embed([tiny_backbones.sentence(n)], bulk=n > 2)) for n in range(5)]
    await reach(held.reached)
    batcher.abandon()
    for caller in callers:
        with pytest.raises(BatcherClosed):
            await asyncio.wait_for(caller, 5)
    with pytest.raises(BatcherClosed):
        await batcher.embed([tiny_backbones.sentence(1)])
    assert batcher.depth == 0
    assert batcher.threads_left > 0
    held.going.set()
    # Released threads find that they were replaced, and end.
    await batcher.close()
    assert batcher.threads_left == 0


async def test_close_does_not_wait_for_what_hangs(
    backbone: Backbone, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.batching.batcher._CLOSING_SECONDS", 1)
    batcher = Batcher(backbone, max_queue=100, workers=1)
    await batcher.start()
    caller = asyncio.create_task(batcher.embed([tiny_backbones.sentence(1)]))
    await reach(held.reached)
    await asyncio.wait_for(batcher.close(), 10)
    with pytest.raises(BatcherClosed):
        await caller


async def test_who_is_not_counted_is_not_observed(backbone: Backbone) -> None:
    seen: list[object] = []
    batcher = Batcher(
        backbone,
        max_queue=100,
        workers=1,
        observe=lambda stage, seconds: seen.append(stage),
        observe_batch=seen.append,
    )
    await batcher.start()
    pace = batcher._queue.predicts.light.pace
    found = await batcher.embed(["a"], counted=False)
    with suppress(TimeoutError):
        await asyncio.wait_for(asyncio.Event().wait(), 0.1)
    assert seen == []
    assert batcher._queue.predicts.light.pace == pace
    assert batcher._queue._predicts_until == 0.0
    np.testing.assert_allclose(found.embeddings[0], backbone.embed(["a"]).embeddings[0], atol=1e-5)
    await batcher.embed(["a"])
    assert batcher._queue._predicts_until > 0.0
    await batcher.close()
    assert "queue" in seen
