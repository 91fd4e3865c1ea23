"""The ways in which shared queues fail, each with real ONNX sessions and concurrent callers."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.arrays import Floats, Prepared
from models.backbone import Backbone, Embedded
from models.batching.batcher import Batcher
from models.batching.core_sharing import CoreSharing
from models.batching.request import (
    BatcherClosed,
    DeadlineExceeded,
    EmbeddingFailed,
    QueuedRequest,
    QueueFull,
)
from models.digests import file_sha256
from models.preprocess.limits import InputError
from models.spec import GRAPH_FILE, TOKENIZER_FILE, TextTransform
from models.store.manifest import read_manifest, write_manifest
from tests.support.models import tiny_backbones

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbones.image_backbone(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbones.text_backbone(tmp_path_factory.mktemp("texts"))


class Gate:
    """Holds the workers where they report that they took something up, until the test opens it."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.reached = threading.Semaphore(0)

    def observe(self, stage: str, seconds: float) -> None:
        if stage == "queue":
            self.reached.release()
            assert self.opened.wait(30)

    async def wait_for(self, workers: int) -> None:
        for _ in range(workers):
            assert await asyncio.to_thread(self.reached.acquire, timeout=30)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@asynccontextmanager
async def running(backbone: Backbone, **options: Any) -> AsyncIterator[Batcher]:
    batcher = Batcher(backbone, **{"max_queue": 10_000, "workers": 2} | options)
    await batcher.start()
    assert batcher.alive
    try:
        yield batcher
    finally:
        await batcher.close()


def alone(backbone: Backbone, item: bytes | str) -> Floats:
    row: Floats = backbone.embed([item]).embeddings[0]
    return row


@pytest.mark.parametrize("kind", ["images", "texts"])
async def test_every_caller_gets_its_own_answers(kind: str, request: pytest.FixtureRequest) -> None:
    """Hundreds of callers, a tenth of the inputs bad, predicts and bulk: nothing is crossed."""
    backbone: Backbone = request.getfixturevalue(kind)
    make: Callable[[int], bytes | str] = (
        tiny_backbones.picture if kind == "images" else tiny_backbones.sentence
    )
    bad: bytes | str = b"no image" if kind == "images" else " "
    rng = np.random.default_rng(0)
    pool = [make(seed) for seed in range(60)]
    expected = backbone.embed(pool).embeddings

    async def call(batcher: Batcher, seed: int) -> None:
        own = np.random.default_rng(seed)
        chosen = own.integers(0, len(pool), int(own.integers(1, 40)))
        spoiled = own.random(len(chosen)) < 0.1
        inputs = [bad if is_bad else pool[i] for i, is_bad in zip(chosen, spoiled, strict=True)]
        await asyncio.sleep(own.random() * 0.2)
        answer = await batcher.embed(inputs, bulk=bool(own.random() < 0.3))
        assert set(answer.errors) == set(np.flatnonzero(spoiled))
        np.testing.assert_array_equal(answer.embeddings[spoiled], 0)
        np.testing.assert_allclose(answer.embeddings[~spoiled], expected[chosen[~spoiled]], atol=1e-5)

    async with running(backbone, workers=3) as batcher:
        await asyncio.gather(*(call(batcher, int(seed)) for seed in rng.integers(0, 2**31, 200)))
        assert batcher.depth == 0


async def test_a_bad_input_fails_alone(images: Backbone) -> None:
    inputs: list[bytes | str] = [
        tiny_backbones.picture(1),
        b"",
        tiny_backbones.picture(2),
        b"GIF89a",
        "a text",
    ]
    async with running(images) as batcher:
        answer = await batcher.embed(inputs)
    assert {index: error.code for index, error in answer.errors.items()} == {
        1: "empty_image",
        3: "undecodable_image",
        4: "wrong_kind",
    }
    for index in (0, 2):
        np.testing.assert_array_equal(answer.embeddings[index], alone(images, inputs[index]))


async def test_what_was_answered_is_let_go_of_at_once(images: Backbone) -> None:
    """Run without garbage collection, which can take tens of milliseconds."""

    def kept() -> int:
        return sum(type(one) in (InputError, QueuedRequest) for one in gc.get_objects())

    async with running(images) as batcher:
        gc.collect()
        gc.disable()
        try:
            before = kept()
            for _ in range(20):
                await batcher.embed([b"GIF89a", tiny_backbones.picture(1)])
                images.embed([b"GIF89a"])
            # The worker thread may still be returning from its last batch.
            await asyncio.sleep(0.1)
            assert kept() <= before
        finally:
            gc.enable()


async def test_no_inputs(images: Backbone) -> None:
    async with running(images) as batcher:
        answer = await batcher.embed([])
    assert answer.embeddings.shape == (0, tiny_backbones.IMAGE_DIM)


@pytest.fixture(scope="module")
def crashing(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """The tiny text backbone with a word whose token its table does not have: ONNX Runtime raises on it."""
    folder = tiny_backbones.text_export(tmp_path_factory.mktemp("crashing"))
    spec = read_manifest(folder, verify=True)
    tokenizer = json.loads((folder / TOKENIZER_FILE).read_text())
    tokenizer["model"]["vocab"]["crash"] = 100_000
    (folder / TOKENIZER_FILE).write_text(json.dumps(tokenizer))
    assert isinstance(spec.transform, TextTransform)
    transform = replace(spec.transform, tokenizer_sha256=file_sha256(folder / TOKENIZER_FILE))
    write_manifest(folder, replace(spec, transform=transform))
    return Backbone.open(folder)


async def test_a_failing_run_fails_its_callers_and_not_the_worker(crashing: Backbone, gate: Gate) -> None:
    async with running(crashing, workers=1, observe=gate.observe) as batcher:
        first = asyncio.create_task(batcher.embed([tiny_backbones.sentence(1)]))
        await gate.wait_for(1)
        # These wait together, so they are run together.
        together = [
            asyncio.create_task(batcher.embed([text])) for text in (tiny_backbones.sentence(2), "crash")
        ]
        await asyncio.sleep(0)
        gate.opened.set()
        assert (await first).errors == {}
        for caller in together:
            with pytest.raises(EmbeddingFailed) as caught:
                await caller
            assert caught.value.__cause__ is not None
        assert batcher.alive
        answer = await batcher.embed([tiny_backbones.sentence(2)])
        np.testing.assert_array_equal(answer.embeddings[0], alone(crashing, tiny_backbones.sentence(2)))


async def test_a_failing_run_drops_the_rest_of_the_request(crashing: Backbone) -> None:
    async with running(crashing, workers=1) as batcher:
        with pytest.raises(EmbeddingFailed):
            await batcher.embed(["crash"] + [tiny_backbones.sentence(seed) for seed in range(500)])
        assert batcher.depth == 0
        assert batcher.alive


async def test_a_cancelled_caller_s_waiting_inputs_are_dropped(images: Backbone, gate: Gate) -> None:
    sizes: list[int] = []
    async with running(images, workers=1, observe=gate.observe, observe_batch=sizes.append) as batcher:
        ahead = asyncio.create_task(batcher.embed([tiny_backbones.picture(1)]))
        await gate.wait_for(1)
        cancelled = asyncio.create_task(batcher.embed([tiny_backbones.picture(2)] * 50))
        bulk = asyncio.create_task(batcher.embed([tiny_backbones.picture(4)] * 3, bulk=True))
        behind = asyncio.create_task(batcher.embed([tiny_backbones.picture(3)]))
        await asyncio.sleep(0)
        assert batcher.depth == 54
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert batcher.depth == 4
        gate.opened.set()
        np.testing.assert_array_equal((await ahead).embeddings[0], alone(images, tiny_backbones.picture(1)))
        np.testing.assert_array_equal((await behind).embeddings[0], alone(images, tiny_backbones.picture(3)))
        await bulk
    assert sum(sizes) == 5


async def test_cancelling_the_last_predict_wakes_bulk(images: Backbone, gate: Gate) -> None:
    async with running(images, workers=1, observe=gate.observe) as batcher:
        ahead = asyncio.create_task(batcher.embed([tiny_backbones.picture(1)]))
        await gate.wait_for(1)
        predict = asyncio.create_task(batcher.embed([tiny_backbones.picture(2)]))
        bulk = asyncio.create_task(batcher.embed([tiny_backbones.picture(3)], bulk=True))
        await asyncio.sleep(0)
        predict.cancel()
        await gate.wait_for(1)
        gate.opened.set()
        await asyncio.gather(ahead, bulk)


async def test_a_deadline_frees_the_caller_and_the_queue(images: Backbone, gate: Gate) -> None:
    async with running(images, workers=1, observe=gate.observe) as batcher:
        ahead = asyncio.create_task(
            batcher.embed([tiny_backbones.picture(1)], deadline=time.monotonic() + 30)
        )
        await gate.wait_for(1)
        with pytest.raises(DeadlineExceeded):
            await batcher.embed([tiny_backbones.picture(2)] * 5, deadline=time.monotonic() + 0.05)
        with pytest.raises(DeadlineExceeded):
            await batcher.embed([tiny_backbones.picture(2)], deadline=time.monotonic() - 1)
        assert batcher.depth == 0
        gate.opened.set()
        assert (await ahead).errors == {}


async def test_a_full_queue_is_overloaded_and_bulk_does_not_fill_it(images: Backbone, gate: Gate) -> None:
    async with running(images, workers=1, max_queue=4, observe=gate.observe) as batcher:
        held = asyncio.create_task(batcher.embed([tiny_backbones.picture(1)]))
        await gate.wait_for(1)
        bulk = asyncio.create_task(batcher.embed([tiny_backbones.picture(2)] * 4, bulk=True))
        await gate.wait_for(1)
        filled = asyncio.create_task(batcher.embed([tiny_backbones.picture(3)] * 4))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as caught:
            await batcher.embed([tiny_backbones.picture(4)])
        assert 0 < caught.value.retry_after < 60
        with pytest.raises(QueueFull):
            await batcher.embed([tiny_backbones.picture(4)] * 4, bulk=True)
        gate.opened.set()
        await asyncio.gather(held, bulk, filled)
        # More than the queue holds is let in while nothing waits; otherwise it never would be.
        assert (await batcher.embed([tiny_backbones.picture(5)] * 9)).embeddings.any()


async def test_a_predict_that_would_wait_too_long_is_refused(images: Backbone, gate: Gate) -> None:
    async with running(images, workers=1, max_wait=0.1, observe=gate.observe) as batcher:
        # Before the first measurement, a small input is assumed to take 10 ms.
        ahead = [asyncio.create_task(batcher.embed([tiny_backbones.picture(1)]))]
        await gate.wait_for(1)
        ahead.append(asyncio.create_task(batcher.embed([tiny_backbones.picture(2)] * 20)))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as caught:
            await batcher.embed([tiny_backbones.picture(3)])
        assert caught.value.retry_after == pytest.approx(0.1, rel=0.05)
        bulk = asyncio.create_task(batcher.embed([tiny_backbones.picture(4)] * 20, bulk=True))
        gate.opened.set()
        await asyncio.gather(*ahead, bulk)
        assert (await batcher.embed([tiny_backbones.picture(3)])).embeddings.any()


async def test_a_flood_of_one_source_keeps_no_other_out(images: Backbone, gate: Gate) -> None:
    """Neither the full queue nor the long wait is the other's doing; it waits for one turn of the flood."""
    async with running(images, workers=1, max_queue=40, max_wait=0.1, observe=gate.observe) as batcher:
        flood = [asyncio.create_task(batcher.embed([tiny_backbones.picture(1)], source="flood"))]
        await gate.wait_for(1)
        # All at once, for what would wait too long is refused.
        flood.append(asyncio.create_task(batcher.embed([tiny_backbones.picture(2)] * 40, source="flood")))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await batcher.embed([tiny_backbones.picture(3)], source="flood")
        with pytest.raises(QueueFull):
            batcher.check_room("flood")
        batcher.check_room("other")
        other = asyncio.create_task(batcher.embed([tiny_backbones.picture(3)], source="other"))
        await asyncio.sleep(0)
        gate.opened.set()
        done, _ = await asyncio.wait([*flood[1:], other], return_when=asyncio.FIRST_COMPLETED)
        assert done == {other}
        await asyncio.gather(*flood)


async def test_predicts_go_before_bulk(images: Backbone, gate: Gate) -> None:
    async with running(images, workers=1, observe=gate.observe) as batcher:
        ahead = asyncio.create_task(batcher.embed([tiny_backbones.picture(1)]))
        await gate.wait_for(1)
        predict = asyncio.create_task(batcher.embed([tiny_backbones.picture(2)]))
        await asyncio.sleep(0)
        bulk = asyncio.create_task(batcher.embed([tiny_backbones.picture(3)] * 50, bulk=True))
        await asyncio.sleep(0.1)
        # The bulk worker is idle and yet takes nothing while a predict waits.
        assert batcher.depth == 51
        gate.opened.set()
        await asyncio.gather(ahead, predict, bulk)


async def test_bulk_leaves_a_core_while_predicts_come(images: Backbone, gate: Gate) -> None:
    async with running(images, workers=2, observe=gate.observe) as batcher:
        predict = asyncio.create_task(batcher.embed([tiny_backbones.picture(1)]))
        await gate.wait_for(1)
        bulk = [asyncio.create_task(batcher.embed([tiny_backbones.picture(2)], bulk=True)) for _ in range(2)]
        await gate.wait_for(1)
        await asyncio.sleep(0.1)
        assert batcher.depth == 1
        # No other predict came, so bulk gets every core soon, without anything to wake it.
        await gate.wait_for(1)
        assert batcher.depth == 0
        gate.opened.set()
        await asyncio.gather(predict, *bulk)


async def test_bulk_runs_on_threads_that_yield_the_cores(images: Backbone) -> None:
    async with running(images, workers=2) as batcher:
        await batcher.embed([tiny_backbones.picture(1)] * 4, bulk=True)
        await batcher.embed([tiny_backbones.picture(1)] * 4)
        own = [thread for thread in threading.enumerate() if thread.name.startswith(images.spec.name)]
        nice = {
            kind: {
                os.getpriority(os.PRIO_PROCESS, thread.native_id or 0)
                for thread in own
                if thread.name.endswith(kind)
            }
            for kind in ("predict", "bulk")
        }
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    assert nice["predict"] == {usual}
    assert min(nice["bulk"]) > usual


async def test_a_large_request_does_not_block_a_small_one(images: Backbone, gate: Gate) -> None:
    async with running(images, workers=1, observe=gate.observe) as batcher:
        large = asyncio.create_task(batcher.embed([tiny_backbones.picture(1)] * 300))
        await gate.wait_for(1)
        small = asyncio.create_task(batcher.embed([tiny_backbones.picture(2)]))
        await asyncio.sleep(0)
        gate.opened.set()
        done, _ = await asyncio.wait({large, small}, return_when=asyncio.FIRST_COMPLETED)
        assert done == {small}
        await large


async def test_one_run_takes_all_where_another_backbone_has_the_cores(
    images: Backbone, texts: Backbone, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs would be slower, each with less in it, and so would one of several threads."""
    cores = CoreSharing()
    runs: list[tuple[int, bool]] = []
    run = texts.run

    def seen(prepared: Sequence[Prepared], *, beside: bool = False) -> Floats:
        runs.append((len(prepared), beside))
        return run(prepared, beside=beside)

    monkeypatch.setattr(texts, "run", seen)
    several: list[bytes | str] = [tiny_backbones.sentence(seed) for seed in range(4)]
    async with (
        running(texts, cores=cores) as batcher,
        running(images, cores=cores, workers=1, observe=gate.observe) as other,
    ):
        await batcher.embed(several[:1])
        assert runs == [(1, False)]
        await batcher.embed(several)
        assert max(runs)[0] == 2
        held = asyncio.create_task(other.embed([tiny_backbones.picture(1)]))
        await gate.wait_for(1)
        runs.clear()
        await batcher.embed(several)
        await batcher.embed(several[:1])
        assert runs == [(4, True), (1, True)]
        # One that hangs and is given up is not reckoned with.
        other.abandon()
        with pytest.raises(BatcherClosed):
            await held
        runs.clear()
        await batcher.embed(several)
        assert max(runs)[0] == 2
        gate.opened.set()


@pytest.mark.parametrize("bulk", [False, True])
async def test_when_a_worker_dies_nobody_waits_for_ever(images: Backbone, bulk: bool) -> None:
    dying = threading.Event()

    def observe(stage: str, seconds: float) -> None:
        if stage == "queue":
            assert dying.wait(30)
            raise SystemExit

    batcher = Batcher(images, max_queue=100, workers=1, observe=observe)
    await batcher.start()
    callers = [
        asyncio.create_task(batcher.embed([tiny_backbones.picture(seed)] * 3, bulk=bulk or seed > 1))
        for seed in range(4)
    ]
    await asyncio.sleep(0)
    dying.set()
    for caller in callers:
        with pytest.raises(BatcherClosed):
            await asyncio.wait_for(caller, 30)
    assert not batcher.alive
    assert batcher.depth == 0
    with pytest.raises(BatcherClosed):
        await batcher.embed([tiny_backbones.picture(1)])
    await batcher.close()


async def test_a_worker_that_dies_while_closing_frees_its_callers(images: Backbone) -> None:
    closing = threading.Event()

    def observe(stage: str, seconds: float) -> None:
        assert closing.wait(30)
        raise SystemExit

    batcher = Batcher(images, max_queue=100, workers=1, observe=observe)
    await batcher.start()
    caller = asyncio.create_task(batcher.embed([tiny_backbones.picture(1)] * 3))
    await asyncio.sleep(0.05)
    close = asyncio.create_task(batcher.close())
    await asyncio.sleep(0)
    closing.set()
    with pytest.raises(BatcherClosed):
        await asyncio.wait_for(caller, 30)
    await asyncio.wait_for(close, 30)


async def test_close_finishes_what_is_queued_and_takes_no_more(texts: Backbone) -> None:
    batcher = Batcher(texts, max_queue=10_000, workers=2)
    await batcher.start()
    callers = [
        asyncio.create_task(batcher.embed([tiny_backbones.sentence(seed)] * 20, bulk=seed % 2 == 0))
        for seed in range(30)
    ]
    await asyncio.sleep(0)
    await batcher.close()
    with pytest.raises(BatcherClosed):
        await batcher.embed([tiny_backbones.sentence(1)])
    for seed, caller in enumerate(callers):
        answer: Embedded = await caller
        np.testing.assert_allclose(
            answer.embeddings[7], alone(texts, tiny_backbones.sentence(seed)), atol=1e-5
        )
    assert not batcher.alive


async def test_a_batcher_that_was_not_started_takes_nothing(images: Backbone) -> None:
    batcher = Batcher(images, max_queue=1, workers=1)
    assert not batcher.alive
    with pytest.raises(BatcherClosed):
        await batcher.embed([tiny_backbones.picture(1)])


async def test_a_batcher_starts_once(images: Backbone) -> None:
    async with running(images) as batcher:
        with pytest.raises(RuntimeError, match="once"):
            await batcher.start()


async def test_what_it_observes(texts: Backbone) -> None:
    stages: list[tuple[str, float]] = []
    sizes: list[int] = []
    async with running(
        texts,
        workers=1,
        observe=lambda stage, seconds: stages.append((stage, seconds)),
        observe_batch=sizes.append,
    ) as batcher:
        answer = await batcher.embed([tiny_backbones.sentence(seed) for seed in range(70)] + [""])
    assert set(answer.timings) == {"tokenize", "queue", "embed"}
    assert all(seconds >= 0 for _, seconds in stages)
    names = [stage for stage, _ in stages]
    assert names.count("tokenize") == 71
    assert names.count("queue") == 1
    assert names.count("embed") == len(sizes)
    assert sum(sizes) == 70
    assert max(sizes) > 1


async def test_a_loop_that_ended_does_not_kill_the_worker(images: Backbone) -> None:
    async with running(images) as batcher:

        def abandon() -> None:
            async def leave() -> None:
                asyncio.get_running_loop().call_later(0.001, lambda: None)
                await asyncio.wait(
                    [asyncio.create_task(batcher.embed([tiny_backbones.picture(1)] * 20))], timeout=0
                )

            asyncio.run(leave())

        await asyncio.to_thread(abandon)
        assert (await batcher.embed([tiny_backbones.picture(2)])).errors == {}
        assert batcher.alive


async def test_texts_without_a_known_token_are_told_from_others(texts: Backbone, images: Backbone) -> None:
    inputs = ["unheard", "ba", " ", "👋", "ba unheard"]
    assert texts.embed(inputs).unknown == {0, 3}
    assert texts.unknown(inputs) == {0, 3}
    long = ["x " * 40 + "ba", "ba " * 40, "x" * 100 + " ba", "y " * 500, " " * 100 + "x", "x" * 100]
    assert texts.unknown(long) == {3, 4, 5} == texts.embed(long).unknown
    async with running(texts, workers=2) as batcher:
        found = await batcher.embed(inputs)
        assert found.unknown == {0, 3}
        assert found.errors.keys() == {2}
        np.testing.assert_allclose(found.embeddings, texts.embed(inputs).embeddings, atol=1e-5)
    tuned = texts.with_network((texts.path / GRAPH_FILE).read_bytes())
    assert tuned.embed(inputs).unknown == {0, 3}
    tuned.close()
    assert images.embed([tiny_backbones.picture(1), b"no image"]).unknown == frozenset()


def blank(pixels: int) -> bytes:
    """A picture of as many pixels in few bytes."""
    buffer = io.BytesIO()
    Image.new("L", (pixels // 1_000, 1_000)).save(buffer, "PNG")
    return buffer.getvalue()


async def test_heavy_inputs_hold_up_no_light_ones(images: Backbone) -> None:
    """Giants have threads of their own, also those of a request with small pictures in it."""
    decoding, go_on = threading.Semaphore(0), threading.Event()
    giant, prepare = blank(4_000_000), images.prepare

    def slow(item: bytes | str, *more: Any) -> Any:
        if item == giant:
            decoding.release()
            assert go_on.wait(30)
        return prepare(item, *more)

    async with running(images, workers=2) as batcher:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(images, "prepare", slow)
            flood = asyncio.create_task(batcher.embed([giant] * 8, source="flood"))
            mixed = asyncio.create_task(
                batcher.embed([giant, tiny_backbones.picture(1), giant], source="mixed")
            )
            for _ in range(2):
                assert await asyncio.to_thread(decoding.acquire, timeout=30)
            # Every thread for heavy inputs is at one, and each has taken one alone.
            assert not decoding.acquire(timeout=0.1)
            answers = await asyncio.gather(
                *(
                    batcher.embed([tiny_backbones.picture(seed)], source=f"small{seed % 3}")
                    for seed in range(20)
                )
            )
            assert all(answer.embeddings.any() for answer in answers)
            assert not flood.done()
            go_on.set()
            found = await mixed
            await flood
    expected = images.embed([giant, tiny_backbones.picture(1), giant]).embeddings
    np.testing.assert_allclose(found.embeddings, expected, atol=1e-5)
    assert batcher.depth == 0


async def test_sources_wait_for_what_the_others_inputs_cost(images: Backbone, gate: Gate) -> None:
    """A flood of giants keeps the small pictures of no source out, its own neither, but its next giant."""
    giant = blank(40_000_000)
    async with running(images, workers=1, max_wait=2.0, observe=gate.observe) as batcher:
        flood = [asyncio.create_task(batcher.embed([giant], source="flood"))]
        await gate.wait_for(1)
        flood.append(asyncio.create_task(batcher.embed([giant] * 60, source="flood")))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as caught:
            await batcher.embed([giant], source="flood")
        assert caught.value.retry_after > 10
        batcher.check_room("flood")
        # Another's giant waits for one of the flood's, at 10 ms for what a small picture costs.
        other = asyncio.create_task(batcher.embed([giant], source="other"))
        await asyncio.sleep(0)
        assert batcher.depth == 61
        for task in (*flood[1:], other):
            task.cancel()
        gate.opened.set()
        await flood[0]


async def test_what_cannot_be_read_makes_no_wait_look_short(images: Backbone) -> None:
    """Data of no known format count as a large picture, and are refused in no time."""
    async with running(images, workers=1) as batcher:
        await batcher.embed([blank(4_000_000)])
        pace = batcher._queue.predicts.heavy.pace
        await batcher.embed([b"no image at all"] * 50)
        assert batcher._queue.predicts.heavy.pace == pace


async def test_long_texts_are_taken_one_by_one_and_short_ones_together(texts: Backbone, gate: Gate) -> None:
    sizes: list[int] = []
    async with running(texts, workers=1, observe=gate.observe, observe_batch=sizes.append) as batcher:
        ahead = [asyncio.create_task(batcher.embed([text])) for text in ("ba", "ba " * 4_000)]
        await gate.wait_for(2)
        long = asyncio.create_task(batcher.embed(["ba " * 4_000] * 6))
        short = asyncio.create_task(batcher.embed(["ba"] * 20))
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(*ahead, long, short)
    assert sorted(sizes) == [1] * 8 + [20]


@pytest.mark.parametrize("bulk", [False, True])
async def test_a_heavy_input_that_waits_for_its_threads_is_not_neglected(
    images: Backbone, bulk: bool, gate: Gate
) -> None:
    """Although those for light ones are idle."""
    async with running(images, workers=1, observe=gate.observe) as batcher:
        callers = [asyncio.create_task(batcher.embed([blank(4_000_000)], bulk=bulk)) for _ in range(2)]
        await gate.wait_for(1)
        assert batcher.depth == 1
        assert not batcher.neglected
        gate.opened.set()
        await asyncio.gather(*callers)
        assert not batcher.neglected


async def test_texts_that_are_cut_are_told_from_others(texts: Backbone) -> None:
    inputs = [
        tiny_backbones.sentence(1),
        tiny_backbones.sentence(2, words=200),
        " ",
        tiny_backbones.sentence(3, words=62),
        "ba " * 9_000,
    ]
    alone = texts.embed(inputs)
    assert alone.truncated == {1, 4}
    assert alone.tokens == 10 + 64 + 64 + 64
    async with running(texts) as batcher:
        found = await batcher.embed(inputs)
        assert (found.truncated, found.tokens) == (alone.truncated, alone.tokens)
        assert (await batcher.embed([tiny_backbones.sentence(1)])).truncated == frozenset()
