"""How a backbone is to be run: what is fastest is taken, noise is not, and what was measured is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.backbone import Backbone, Floats, planned
from models.plan import PLAN_FILE, Embed, Plan, Run, keep_plan, measure, measure_on_gpu, read_plan
from models.preprocess import Prepared
from tests import tiny

USUAL = Plan(alone=2, workers=2, beside=1, batch=1)
BATCHES = (1, 8, 32)


def machine(seconds: Callable[[int, int], float]) -> tuple[Callable[[int], Run], list[int]]:
    """Runs that take seconds(threads, items), and the threads of the sessions opened."""
    opened: list[int] = []

    def open_run(threads: int) -> Run:
        opened.append(threads)
        return lambda feed: time.sleep(seconds(threads, feed["items"]))

    return open_run, opened


def feed(items: int) -> Mapping[str, Any]:
    return {"items": items}


def test_what_is_fastest_is_taken() -> None:
    # Two threads halve a run, and batches of 8 cost little more than one.
    open_run, opened = machine(lambda threads, items: 0.004 / threads * (1 + 0.05 * (items - 1)))
    plan = measure(USUAL, BATCHES, open_run, feed)
    assert plan.alone == 2
    assert plan.batch == 32
    assert sorted(opened) == [1, 2]


def test_one_run_with_all_threads_where_runs_beside_each_other_are_slow() -> None:
    def seconds(threads: int, items: int) -> float:
        return (0.002 if threads == 2 else 0.008) * items * (1 + 0.02 * items)

    open_run, _ = machine(seconds)
    assert measure(USUAL, BATCHES, open_run, feed) == Plan(alone=2, workers=1, beside=2, batch=1)


def test_threads_that_do_not_help_are_not_taken() -> None:
    # Batches are slower by far more than sleeps, on a busy machine too, take longer than asked.
    open_run, _ = machine(lambda threads, items: 0.002 * threads * items * (1 + 0.08 * items))
    assert measure(USUAL, BATCHES, open_run, feed) == Plan(alone=1, workers=2, beside=1, batch=1)


def test_what_is_as_good_stays_as_usual() -> None:
    # A sleep takes a little longer than asked, which favours large batches: so they are slower by a
    # fiftieth.
    open_run, _ = machine(lambda threads, items: 0.01 * items * (1 + 0.0007 * items) / threads)
    assert measure(USUAL, BATCHES, open_run, feed) == USUAL


GPU = Plan.usual("image", "cuda", 16)


def gpu(seconds: Callable[[Plan, int], float], half_gives: float = 1.0) -> Callable[[Plan], Any]:
    """What opens runs that take seconds(plan, items); in half precision the embeddings are others."""

    @contextmanager
    def open_run(plan: Plan) -> Iterator[Embed]:
        def embed(prepared: Sequence[Prepared]) -> Floats:
            time.sleep(seconds(plan, len(prepared)))
            return np.asarray([[1.0, half_gives if plan.half else 1.0]] * len(prepared), np.float32)

        yield embed

    return open_run


def probes() -> list[Prepared]:
    return [np.zeros(1)] * 128


def test_a_gpu_has_a_batch_a_precision_and_graphs_to_choose() -> None:
    def seconds(plan: Plan, items: int) -> float:
        return (0.004 if items <= 64 else 0.02) / (1 + plan.half) + (0.001 if plan.graphs else 0.004)

    assert measure_on_gpu(GPU, True, gpu(seconds), probes()) == Plan(16, 16, 1, 64, half=True, graphs=True)
    assert measure_on_gpu(GPU, False, gpu(seconds), probes()) == Plan(16, 16, 1, 64, graphs=True)


def test_half_precision_that_gives_other_embeddings_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    found = measure_on_gpu(GPU, True, gpu(lambda plan, items: 0.002 * items, half_gives=1.1), probes())
    assert not found.half
    assert "other embeddings" in caplog.text


def test_graphs_that_cannot_be_captured_are_not_taken_and_another_error_is_raised() -> None:
    def seconds(plan: Plan, items: int) -> float:
        if plan.graphs:
            raise RuntimeError("an If node")
        return 0.001

    assert not measure_on_gpu(GPU, True, gpu(seconds), probes()).graphs

    def failing(plan: Plan, items: int) -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure_on_gpu(GPU, True, gpu(failing), probes())


@pytest.mark.parametrize("make", [tiny.image_export, tiny.text_export])
def test_a_plan_is_measured_once_and_kept(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    export = make(tmp_path)
    found = planned(export, device="cpu", threads=2)
    usual = Plan.usual(Backbone.open(export).spec.kind, "cpu", 2)
    assert read_plan(export, usual, "cpu") == found
    # What is kept is taken, whatever is fastest.
    kept = Plan(alone=1, workers=3, beside=1, batch=5)
    keep_plan(export, usual, "cpu", kept)
    assert planned(export, device="cpu", threads=2) == kept
    backbone = Backbone.open(export, plan=kept)
    assert (backbone.batch, backbone.plan) == (5, kept)
    # No worker would serve nobody.
    keep_plan(export, usual, "cpu", Plan(alone=1, workers=0, beside=1, batch=5))
    assert read_plan(export, usual, "cpu") is None
    # Another number of threads is another question.
    assert read_plan(export, Plan.usual("image", "cpu", 4), "cpu") is None


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"about": 1, "plan": {}}', None])
def test_what_cannot_be_read_is_measured_again(tmp_path: Path, content: str | None) -> None:
    export = tiny.image_export(tmp_path)
    if content is not None:
        (export / PLAN_FILE).write_text(content)
    assert planned(export, device="cpu", threads=1).workers == 1
    assert json.loads((export / PLAN_FILE).read_text())["plan"]["workers"] == 1


def test_where_nothing_can_be_written_it_is_measured_all_the_same(tmp_path: Path) -> None:
    export = tiny.image_export(tmp_path)
    (export / PLAN_FILE).mkdir()
    assert planned(export, device="cpu", threads=1).workers == 1
    assert not list(export.glob(".*"))
