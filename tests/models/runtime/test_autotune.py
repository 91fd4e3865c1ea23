"""How a backbone is to be run: what is fastest is taken, noise is not, and what was measured is kept."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from models.backbone import Backbone
from models.runtime.autotune import (
    PLAN_FILE,
    ExecutionPlan,
    MeasuredPlan,
    Run,
    Trial,
    TrialFailed,
    is_quiet,
    keep_plan,
    measure,
    measure_on_gpu,
    read_plan,
    spread_of,
    ways_on_gpu,
)
from models.runtime.trial import try_out
from models.runtime.usage import Usage
from models.survey import known_plan, planned, survey
from tests.support.models import tiny_backbones

CONFIRMED = {"others": 0.02, "spread": 0.05}
DOUBTFUL = {"others": 0.9, "spread": 0.3}
USUAL = ExecutionPlan(alone=2, workers=2, beside=1, batch=1)
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


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements count as taken on a quiet machine."""
    monkeypatch.setattr(MeasuredPlan, "confirmed", True)


@pytest.mark.usefixtures("quiet")
def test_what_is_fastest_is_taken() -> None:
    # Two threads halve a run, and batches of 8 cost little more than one.
    open_run, opened = machine(lambda threads, items: 0.004 / threads * (1 + 0.05 * (items - 1)))
    plan = measure(USUAL, BATCHES, open_run, feed).plan
    assert plan.alone == 2
    assert plan.batch == 32
    assert sorted(opened) == [1, 2]


@pytest.mark.usefixtures("quiet")
def test_one_run_with_all_threads_where_runs_beside_each_other_are_slow() -> None:
    def seconds(threads: int, items: int) -> float:
        return (0.002 if threads == 2 else 0.008) * items * (1 + 0.02 * items)

    open_run, _ = machine(seconds)
    assert measure(USUAL, BATCHES, open_run, feed).plan == ExecutionPlan(
        alone=2, workers=1, beside=2, batch=1
    )


@pytest.mark.usefixtures("quiet")
def test_threads_that_do_not_help_are_not_taken() -> None:
    # Batches are slower by far more than sleeps, on a busy machine too, take longer than asked.
    open_run, _ = machine(lambda threads, items: 0.002 * threads * items * (1 + 0.08 * items))
    assert measure(USUAL, BATCHES, open_run, feed).plan == ExecutionPlan(
        alone=1, workers=2, beside=1, batch=1
    )


@pytest.mark.alone
@pytest.mark.usefixtures("quiet")
def test_what_is_as_good_stays_as_usual() -> None:
    # A sleep takes a little longer than asked, which favours large batches: so they are slower by a
    # fiftieth.
    open_run, _ = machine(lambda threads, items: 0.01 * items * (1 + 0.0007 * items) / threads)
    assert measure(USUAL, BATCHES, open_run, feed).plan == USUAL


GPU = ExecutionPlan.usual("image", "cuda", 16)
WAYS = ways_on_gpu(GPU, True, True)
ON_GPU = (8, 32, 64, 128)


def gpu(
    seconds: Callable[[ExecutionPlan, int], float], half_gives: float = 1.0
) -> Callable[[ExecutionPlan], Trial]:
    """Tries runs that take seconds(plan, items); in half precision the embeddings are others."""

    def try_out(plan: ExecutionPlan) -> Trial:
        rounds = {count: [count / seconds(plan, count)] * 3 for count in (1, *ON_GPU)}
        return Trial(half_gives if plan.half else 1.0, 1.0, 0.01, rounds)

    return try_out


def test_a_gpu_has_a_batch_a_precision_graphs_and_a_layout_to_choose() -> None:
    def seconds(plan: ExecutionPlan, items: int) -> float:
        run = (0.004 if items <= 64 else 0.02) / (1 + plan.half) + (0.001 if plan.graphs else 0.004)
        return run * (0.8 if plan.channels_last else 1.0)

    found = measure_on_gpu(GPU, WAYS, ON_GPU, gpu(seconds))
    assert found.plan == ExecutionPlan(16, 16, 1, 64, half=True, graphs=True, channels_last=True)
    assert found.confirmed
    assert found.cosine == 1.0
    single = measure_on_gpu(GPU, ways_on_gpu(GPU, False, False), ON_GPU, gpu(seconds)).plan
    assert single == ExecutionPlan(16, 16, 1, 64, graphs=True)


def test_the_smallest_batch_that_is_about_as_fast_is_taken() -> None:
    rates = {1: 900.0, 8: 5_000.0, 32: 9_700.0, 64: 9_900.0, 128: 10_000.0}
    found = measure_on_gpu(GPU, WAYS, ON_GPU, gpu(lambda plan, items: items / rates[items]))
    assert found.plan.batch == 32


def test_where_single_inputs_are_fastest_the_best_batch_is_taken() -> None:
    rates = {1: 1_000.0, 8: 700.0, 32: 600.0, 64: 600.0, 128: 500.0}
    found = measure_on_gpu(GPU, WAYS, ON_GPU, gpu(lambda plan, items: items / rates[items]))
    assert found.plan.batch == 8


def test_half_precision_that_gives_other_embeddings_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    found = measure_on_gpu(GPU, WAYS, ON_GPU, gpu(lambda plan, items: 0.002 * items, half_gives=0.999)).plan
    assert not found.half
    assert "embeddings are others" in caplog.text


def test_where_every_way_gives_other_embeddings_the_usual_one_is_taken_in_doubt() -> None:
    def try_out(plan: ExecutionPlan) -> Trial:
        return Trial(math.nan, 1.0, 0.0, {count: [1.0] for count in (1, *ON_GPU)})

    found = measure_on_gpu(GPU, WAYS, ON_GPU, try_out)
    assert found.plan == GPU
    assert not found.confirmed


def test_ways_that_fail_are_not_taken_and_where_all_do_it_is_said() -> None:
    works = gpu(lambda plan, items: 0.001)

    def without_graphs(plan: ExecutionPlan) -> Trial:
        if plan.graphs:
            raise TrialFailed("an If node")
        return works(plan)

    assert not measure_on_gpu(GPU, WAYS, ON_GPU, without_graphs).plan.graphs

    def failing(plan: ExecutionPlan) -> Trial:
        raise TrialFailed("out of memory")

    with pytest.raises(TrialFailed, match="out of memory"):
        measure_on_gpu(GPU, WAYS, ON_GPU, failing)


@pytest.mark.parametrize("make", [tiny_backbones.image_export, tiny_backbones.text_export])
def test_a_way_is_tried_in_a_process_of_its_own(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """The CPU plays the device: a failing trial is reported, and an endless one is ended."""
    export = make(tmp_path)
    trial = try_out(export, ExecutionPlan(1, 1, 1, 4), (1, 4), "cpu")
    assert trial.cosine == pytest.approx(1.0, abs=1e-6)
    assert [len(trial.rounds[count]) for count in (1, 4)] == [5, 5]
    assert all(rate > 0 for rates in trial.rounds.values() for rate in rates)
    assert trial.opening > 0
    (export / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(TrialFailed, match="not the file that was exported"):
        try_out(export, ExecutionPlan(1, 1, 1, 4), (1,), "cpu")


def test_a_trial_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.runtime.trial._MOST_SECONDS", 0.01)
    with pytest.raises(TrialFailed, match="took more than"):
        try_out(tiny_backbones.text_export(tmp_path), ExecutionPlan(1, 1, 1, 4), (1,), "cpu")


@pytest.mark.parametrize("make", [tiny_backbones.image_export, tiny_backbones.text_export])
def test_a_plan_is_measured_once_and_kept(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    export = make(tmp_path)
    found = planned(export, device="cpu", threads=2)
    usual = ExecutionPlan.usual(Backbone.open(export).spec.kind, "cpu", 2)
    assert read_plan(export, usual, "cpu") == found == known_plan(export, device="cpu", threads=2)
    # A stored plan is used, also if another is faster.
    kept = MeasuredPlan(ExecutionPlan(alone=1, workers=3, beside=1, batch=5), **CONFIRMED)
    keep_plan(export, usual, "cpu", kept)
    assert planned(export, device="cpu", threads=2) == kept
    backbone = Backbone.open(export, plan=kept.plan)
    assert (backbone.batch, backbone.plan) == (5, kept.plan)
    # A plan without workers would serve no request.
    keep_plan(
        export, usual, "cpu", MeasuredPlan(ExecutionPlan(alone=1, workers=0, beside=1, batch=5), **CONFIRMED)
    )
    assert read_plan(export, usual, "cpu") is None
    # Another number of threads is another question.
    assert read_plan(export, ExecutionPlan.usual("image", "cpu", 4), "cpu") is None


def test_a_plan_is_confirmed_by_a_quiet_machine() -> None:
    assert MeasuredPlan(USUAL, **CONFIRMED).confirmed
    assert not MeasuredPlan(USUAL, others=0.5, spread=0.01).confirmed
    assert not MeasuredPlan(USUAL, others=0.0, spread=0.5).confirmed


def test_the_spread_is_how_far_rounds_lie_below_their_best() -> None:
    assert spread_of([[100.0] * 5, [7.0] * 5]) == 0.0
    # A single bad round is nothing, and so is a single way that varies by itself.
    assert spread_of([[100.0, 99.0, 98.0, 40.0, 99.0], [50.0, 50.0, 50.0, 49.0, 50.0], [9.0, 4.0, 4.0]]) == (
        pytest.approx(0.01)
    )
    assert spread_of([[100.0, 60.0, 70.0, 50.0, 90.0], [10.0, 5.0, 8.0, 7.0, 6.0]]) > 0.25


def test_a_doubtful_plan_gives_way_to_one_that_is_doubted_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a start the plan is used as it is, unless the machine is quiet."""
    export = tiny_backbones.text_export(tmp_path)
    usual = ExecutionPlan.usual("text", "cpu", 2)
    kept = MeasuredPlan(ExecutionPlan(alone=1, workers=1, beside=1, batch=3), **DOUBTFUL)
    keep_plan(export, usual, "cpu", kept)
    monkeypatch.setattr("models.survey.is_quiet", lambda: False)
    assert planned(export, device="cpu", threads=2) == kept

    def found(others: float) -> MeasuredPlan:
        measured = MeasuredPlan(USUAL, others, 0.0)
        monkeypatch.setattr("models.survey.measure", lambda *_: measured)
        return measured

    found(0.95)
    assert survey(export, device="cpu", threads=2) == kept
    better = found(0.5)
    assert survey(export, device="cpu", threads=2) == better
    monkeypatch.setattr("models.survey.is_quiet", lambda: True)
    quiet = found(0.01)
    assert planned(export, device="cpu", threads=2) == quiet
    assert read_plan(export, usual, "cpu") == quiet
    found(0.3)
    assert survey(export, device="cpu", threads=2) == quiet


def test_in_doubt_only_what_is_much_faster_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two busy processes make one thread look better than two."""
    open_run, _ = machine(lambda threads, items: 0.002 * items * (1.0 if threads == 1 else 1.3))
    monkeypatch.setattr("models.runtime.autotune.Usage.others", lambda usage: 0.9)
    doubtful = measure(USUAL, (1,), open_run, feed)
    assert not doubtful.confirmed
    assert doubtful.plan.alone == 2
    monkeypatch.setattr(MeasuredPlan, "confirmed", True)
    assert measure(USUAL, (1,), open_run, feed).plan.alone == 1


def test_what_others_use_of_the_cores_is_seen() -> None:
    """A process that is busy on each core is, and this one is not."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        time.sleep(0.3)
        usage = Usage()
        time.sleep(0.5)
        assert usage.others() > 0.8
        assert not is_quiet(0.5)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    usage, begun = Usage(), time.process_time()
    wall = time.perf_counter()
    while time.process_time() - begun < 0.5:
        pass
    mine = 0.5 / (time.perf_counter() - wall) / len(busy)
    assert usage.others() < 1.0 - mine + 0.1


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"about": 1, "plan": {}}', None])
def test_what_cannot_be_read_is_measured_again(tmp_path: Path, content: str | None) -> None:
    export = tiny_backbones.image_export(tmp_path)
    if content is not None:
        (export / PLAN_FILE).write_text(content)
    assert planned(export, device="cpu", threads=1).plan.workers == 1
    assert json.loads((export / PLAN_FILE).read_text())["plan"]["workers"] == 1


def test_where_nothing_can_be_written_it_is_measured_all_the_same(tmp_path: Path) -> None:
    export = tiny_backbones.image_export(tmp_path)
    (export / PLAN_FILE).mkdir()
    assert planned(export, device="cpu", threads=1).plan.workers == 1
    assert not list(export.glob(".*"))
