"""The path of runs on a GPU: most of it is tested on the CPU, the rest needs a GPU."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from models.arrays import Prepared
from models.backbone import Backbone
from models.batching.batcher import Batcher
from models.batching.request import EmbeddingFailed
from models.batching.stall_detector import StallDetector
from models.export.float16 import halve
from models.runtime.autotune import ExecutionPlan
from models.runtime.bound_shape import STAGES
from models.runtime.cuda import CudaRunner, DeviceLost
from models.runtime.device_access import DeviceAccess
from models.runtime.progress import PATIENCE
from models.runtime.session import open_session
from models.runtime.shapes import shapes_for
from models.spec import GRAPH_FILE, HALF_FILE
from models.store.manifest import read_manifest, write_manifest
from models.survey import planned
from tests.support.conditions import until
from tests.support.models import tiny_backbones
from tests.support.models.gpu import require_gpu

Make = Callable[[Path], Path]
KINDS = pytest.mark.parametrize("make", [tiny_backbones.image_export, tiny_backbones.text_export])
ROWS = 8


@pytest.fixture
def gpu() -> None:
    """See require_gpu."""
    require_gpu()


def inputs(backbone: Backbone, count: int) -> list[Prepared]:
    """Prepared inputs, texts of very different lengths."""
    if backbone.spec.kind == "image":
        return [backbone.preprocess(tiny_backbones.picture(seed)) for seed in range(count)]
    return [
        backbone.preprocess(tiny_backbones.sentence(seed, words=seed * 7 % 80 + 1)) for seed in range(count)
    ]


@pytest.fixture(params=[tiny_backbones.image_export, tiny_backbones.text_export])
def reference(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backbone]:
    make: Make = request.param
    backbone = Backbone.open(make(tmp_path), threads=1)
    yield backbone
    backbone.close()


def simulated(backbone: Backbone, *, graphs: bool = False, **more: Any) -> CudaRunner:
    """The runner with sessions on the CPU, where memory is bound alike; the id of a graph means nothing."""
    more.setdefault("open_session", lambda: open_session(backbone.path / GRAPH_FILE, device="cpu"))
    more.setdefault("access", DeviceAccess())
    shapes = more.pop("shapes", shapes_for(backbone.spec, ROWS))
    opens = more.pop("open_session")
    return CudaRunner(backbone.spec, opens, shapes, inputs(backbone, 9), device="cpu", graphs=graphs, **more)


@pytest.fixture(params=[False, True], ids=["plain", "graphs"])
def runner(request: pytest.FixtureRequest, reference: Backbone) -> Iterator[CudaRunner]:
    opened = simulated(reference, graphs=request.param)
    yield opened
    opened.close()


def test_it_gives_what_unbound_runs_give_whatever_the_shapes(reference: Backbone, runner: CudaRunner) -> None:
    prepared = inputs(reference, 40)
    # Smaller after larger: what is left of earlier rows must not show.
    for some in (prepared, prepared[:1], prepared[:3], prepared[5:10], prepared[::-1], []):
        np.testing.assert_allclose(runner.run(some), reference.run(some), atol=1e-5)


def test_it_tells_what_its_thread_does(reference: Backbone, runner: CudaRunner) -> None:
    assert sum(runner.seconds.values()) < 0.1  # What opening took is not in it.
    begun = time.perf_counter()
    time.sleep(0.2)
    for some in (inputs(reference, 40), inputs(reference, 3)):
        runner.run(some)
    seconds, passed = dict(runner.seconds), time.perf_counter() - begun
    assert tuple(seconds) == STAGES
    assert seconds["wait"] >= 0.2
    assert all(0 < seconds[stage] < passed for stage in STAGES[1:])


def test_many_threads_get_their_own(reference: Backbone, runner: CudaRunner) -> None:
    prepared = inputs(reference, 24)
    wanted = reference.run(prepared)

    def ask(first: int) -> bool:
        count = first % 5 + 1
        return bool(
            np.allclose(runner.run(prepared[first : first + count]), wanted[first : first + count], atol=1e-5)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, list(range(24)) * 10))


class Watched:
    """A session that tells of each run, and waits before it once it is told to."""

    def __init__(self, session: onnxruntime.InferenceSession, tell: Callable[[], None]) -> None:
        self._session = session
        self._tell = tell

    def io_binding(self) -> onnxruntime.IOBinding:
        return self._session.io_binding()

    def run_with_iobinding(self, *arguments: object) -> None:
        self._tell()
        self._session.run_with_iobinding(*arguments)


def watched(backbone: Backbone, tell: Callable[[], None]) -> Callable[[], Any]:
    return lambda: Watched(open_session(backbone.path / GRAPH_FILE, device="cpu"), tell)


class Hold:
    """Holds up runs once it is closed, until it is opened."""

    def __init__(self) -> None:
        self.runs = 0
        self.reached, self.go = threading.Event(), threading.Event()
        self.go.set()

    def close(self) -> None:
        self.runs = 0
        self.reached.clear()
        self.go.clear()

    def __call__(self) -> None:
        self.runs += 1
        self.reached.set()
        assert self.go.wait(10)


def test_what_comes_while_it_runs_goes_into_the_next_run(reference: Backbone) -> None:
    hold = Hold()
    runner = simulated(reference, open_session=watched(reference, hold))
    (one,) = inputs(reference, 1)
    hold.close()
    found = [runner.submit([one])]
    assert hold.reached.wait(10)
    found += [runner.submit([one]) for _ in range(ROWS)]
    assert not any(future.done() for future in found)
    hold.go.set()
    for future in found:
        np.testing.assert_allclose(future.result(10), reference.run([one]), atol=1e-5)
    runner.close()
    assert hold.runs == 2


def test_who_submits_waits_while_two_runs_are_waiting(reference: Backbone) -> None:
    hold = Hold()
    runner = simulated(reference, open_session=watched(reference, hold))
    (one,) = inputs(reference, 1)
    hold.close()
    found = [runner.submit([one])]
    assert hold.reached.wait(10)
    found += [runner.submit([one] * ROWS) for _ in range(2)]
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(runner.submit, [one])
        time.sleep(0.1)
        assert not late.done()
        hold.go.set()
        found.append(late.result(10))
    assert [len(future.result(10)) for future in found] == [1, ROWS, ROWS, 1]
    runner.close()


def test_shapes_are_opened_before_the_first_run_the_largest_first(reference: Backbone) -> None:
    sessions: list[int] = []

    def opened() -> Any:
        sessions.append(1)
        return open_session(reference.path / GRAPH_FILE, device="cpu")

    runner = simulated(reference, open_session=opened)
    shapes = shapes_for(reference.spec, ROWS)
    # Convolutions are planned anew for another number of images; matrix products are not.
    assert len(sessions) == (len(shapes) if reference.spec.kind == "image" else 1)
    assert list(shapes) == sorted(shapes, key=lambda shape: -shape.size)
    assert {shape.rows for shape in shapes} == {1, 2, 4, 8}
    before = len(sessions)
    runner.run(inputs(reference, 13))
    assert len(sessions) == before
    runner.close()


@KINDS
@pytest.mark.parametrize("batch", [1, 3, 64, 200, 1024])
def test_every_number_of_inputs_has_a_shape(tmp_path: Path, make: Make, batch: int) -> None:
    spec = read_manifest(make(tmp_path), verify=True)
    for few in (False, True):
        shapes = shapes_for(spec, batch, few=few)
        assert max(shape.rows for shape in shapes) == batch
        widest = max(shape.width for shape in shapes)
        assert any(shape.rows == 1 and shape.width == widest for shape in shapes)
        assert len(shapes) <= 50
        if spec.kind == "text":
            assert widest == tiny_backbones.TOKENS
            assert all(shape.rows == 1 or shape.size <= 32_768 for shape in shapes)
        else:
            assert widest == 0


def test_nothing_else_uses_the_device_while_a_graph_is_captured(reference: Backbone) -> None:
    """Two networks are opened beside each other, and one that runs all the time is replaced by another."""
    access, inside, wrong = DeviceAccess(), [0, 0], []
    lock = threading.Lock()

    def use(alone: bool) -> None:
        with lock:
            inside[alone] += 1
            if inside[True] > 1 or (inside[True] and inside[False]):
                wrong.append(tuple(inside))
        time.sleep(0.0005)
        with lock:
            inside[alone] -= 1

    class Seen(DeviceAccess):
        @contextmanager
        def shared(self) -> Iterator[None]:
            with access.shared():
                use(False)
                yield

        @contextmanager
        def alone(self) -> Iterator[None]:
            with access.alone():
                use(True)
                yield

    running, prepared = simulated(reference, graphs=True, access=Seen()), inputs(reference, 5)
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            running.run(prepared)

    with ThreadPoolExecutor(4) as pool:
        asking = pool.submit(ask)
        others = [pool.submit(simulated, reference, graphs=True, access=Seen()) for _ in range(3)]
        for other in others:
            np.testing.assert_allclose(other.result(30).run(prepared), reference.run(prepared), atol=1e-5)
            other.result().close()
        ended.set()
        asking.result(30)
    running.close()
    assert not wrong


def test_who_wants_the_device_alone_is_let_in_before_those_that_come_later() -> None:
    access, order = DeviceAccess(), []
    holding, go = threading.Event(), threading.Event()

    def hold() -> None:
        with access.shared():
            holding.set()
            assert go.wait(10)
            order.append("first")

    def alone() -> None:
        with access.alone():
            order.append("alone")

    def later() -> None:
        with access.shared():
            order.append("later")

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(hold)]
        assert holding.wait(10)
        futures.append(pool.submit(alone))
        while not access._waiting:
            time.sleep(0.001)
        futures.append(pool.submit(later))
        time.sleep(0.05)
        assert order == []
        go.set()
        for future in futures:
            future.result(10)
    assert order == ["first", "alone", "later"]


def test_a_graph_that_answers_otherwise_once_others_are_captured_is_not_served(reference: Backbone) -> None:
    """As a graph does whose session has planned anew since."""
    shapes = shapes_for(reference.spec, ROWS)
    runs = 0

    class Forgetful:
        def __init__(self, session: onnxruntime.InferenceSession) -> None:
            self._session = session

        def io_binding(self) -> onnxruntime.IOBinding:
            return self._session.io_binding()

        def run_with_iobinding(self, binding: onnxruntime.IOBinding, *more: object) -> None:
            nonlocal runs
            runs += 1
            self._session.run_with_iobinding(binding, *more)
            if runs > len(shapes):
                output = binding.get_outputs()[0]
                output.update_inplace(-output.numpy())

    with pytest.raises(RuntimeError, match="other embeddings"):
        simulated(
            reference,
            graphs=True,
            open_session=lambda: Forgetful(open_session(reference.path / GRAPH_FILE, device="cpu")),
        )


def test_what_opening_raises_is_raised(reference: Backbone) -> None:
    def refuse() -> Any:
        raise ValueError("no capture")

    with pytest.raises(ValueError, match="no capture"):
        simulated(reference, open_session=refuse)


def test_a_device_that_is_lost_is_not_used_again(reference: Backbone) -> None:
    broken = False

    def tell() -> None:
        if broken:
            raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")

    runner = simulated(reference, open_session=watched(reference, tell), is_lost=lambda: broken)
    (one,) = inputs(reference, 1)
    assert len(runner.run([one])) == 1
    broken = True
    with pytest.raises(DeviceLost, match="illegal memory access"):
        runner.run([one])
    assert runner.lost
    with pytest.raises(DeviceLost):
        runner.submit([one])
    runner.close()


def test_what_its_thread_is_at_can_be_seen(reference: Backbone) -> None:
    hold = Hold()
    runner = simulated(reference, open_session=watched(reference, hold))
    (one,) = inputs(reference, 1)
    steps = runner.progress.steps
    hold.close()
    future = runner.submit([one])
    assert hold.reached.wait(10)
    assert runner.progress.busy
    assert runner.progress.allowed == PATIENCE
    hold.go.set()
    future.result(10)
    runner.close()
    assert (runner.progress.busy, runner.progress.allowed) == (False, 0.0)
    assert runner.progress.steps > steps


def test_an_error_is_its_callers_and_the_next_run_goes_on(reference: Backbone, runner: CudaRunner) -> None:
    with pytest.raises((ValueError, TypeError)):
        runner.run([np.zeros((2, 2), np.float32)])
    prepared = inputs(reference, 2)
    np.testing.assert_allclose(runner.run(prepared), reference.run(prepared), atol=1e-5)


def test_closed_it_runs_what_waits_and_then_says_so(reference: Backbone) -> None:
    hold = Hold()
    runner = simulated(reference, open_session=watched(reference, hold))
    (one,) = inputs(reference, 1)
    hold.close()
    found = [runner.submit([one]) for _ in range(3)]
    hold.go.set()
    runner.close()
    assert all(future.done() for future in found)
    with pytest.raises(RuntimeError, match="closed"):
        runner.run([one])


def has_waiting(runner: CudaRunner, rows: int) -> bool:
    return runner._rows == rows


def served(backbone: Backbone, runner: CudaRunner) -> Backbone:
    """The same backbone as it is on a GPU: run by the runner's thread."""
    plan = ExecutionPlan(1, 2, 1, ROWS)
    preprocessor = backbone._preprocessor
    return Backbone(backbone.spec, backbone.path, runner, runner, preprocessor, "cuda", plan)


def raw(backbone: Backbone, count: int) -> list[bytes | str]:
    if backbone.spec.kind == "image":
        return [tiny_backbones.picture(seed) for seed in range(count)]
    return [tiny_backbones.sentence(seed, words=seed * 7 % 80 + 1) for seed in range(count)]


@pytest.mark.anyio
async def test_through_a_batcher_everybody_gets_his_own(reference: Backbone, runner: CudaRunner) -> None:
    batcher = Batcher(served(reference, runner), max_queue=200, workers=2)
    await batcher.start()
    some = raw(reference, 40)
    wanted = reference.embed(some).embeddings
    found = await asyncio.gather(
        *(batcher.embed(some[start : start + 3], source=str(start % 4)) for start in range(0, 39, 3))
    )
    np.testing.assert_allclose(np.concatenate([one.embeddings for one in found]), wanted[:39], atol=1e-5)
    assert all(one.timings["embed"] > 0 for one in found)
    bad = await batcher.embed([some[0], "" if reference.spec.kind == "text" else b"no picture"])
    assert list(bad.errors) == [1]
    np.testing.assert_allclose(bad.embeddings[0], wanted[0], atol=1e-5)
    await batcher.close()


@pytest.mark.anyio
async def test_workers_prepare_what_comes_next_while_a_run_is_under_way(reference: Backbone) -> None:
    hold = Hold()
    runner = simulated(reference, open_session=watched(reference, hold))
    batcher = Batcher(served(reference, runner), max_queue=200, workers=1)
    await batcher.start()
    some = raw(reference, 3)
    hold.close()
    callers = [asyncio.create_task(batcher.embed(some[:1]))]
    assert await asyncio.to_thread(hold.reached.wait, 10)
    for waiting, one in enumerate(some[1:], start=1):
        callers.append(asyncio.create_task(batcher.embed([one])))
        # The only worker has prepared it, although the first run has not returned.
        await asyncio.to_thread(until, partial(has_waiting, runner, waiting))
    standstill = StallDetector(batcher)
    assert standstill.look(0.0) is None
    assert standstill.look(PATIENCE) is None
    # The run does not return.
    assert "a run has not returned" in str(standstill.look(1.0))
    assert not any(caller.done() for caller in callers)
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0.05)
    hold.go.set()
    await closing
    found = await asyncio.gather(*callers)
    np.testing.assert_allclose(
        np.concatenate([one.embeddings for one in found]), reference.embed(some).embeddings, atol=1e-5
    )
    runner.close()


@pytest.mark.anyio
async def test_a_run_that_fails_fails_for_its_callers_alone(reference: Backbone) -> None:
    broken = True

    def tell() -> None:
        if broken and opened:
            raise RuntimeError("out of memory")

    opened = False
    runner = simulated(reference, open_session=watched(reference, tell))
    opened = True
    batcher = Batcher(served(reference, runner), max_queue=200, workers=2)
    await batcher.start()
    some = raw(reference, 1)
    with pytest.raises(EmbeddingFailed):
        await batcher.embed(some)
    assert not batcher.backbone.lost
    broken = False
    np.testing.assert_allclose(
        (await batcher.embed(some)).embeddings, reference.embed(some).embeddings, atol=1e-5
    )
    await batcher.close()
    runner.close()


@KINDS
def test_half_precision_is_nearly_single(tmp_path: Path, make: Make) -> None:
    folder = make(tmp_path)
    halve(folder)
    write_manifest(folder, read_manifest(folder, verify=True))
    reference = Backbone.open(folder, threads=1)
    assert (folder / HALF_FILE).stat().st_size < 0.7 * (folder / GRAPH_FILE).stat().st_size
    runner = simulated(reference, open_session=lambda: open_session(folder / HALF_FILE, device="cpu"))
    prepared = inputs(reference, 12)
    one, other = runner.run(prepared), reference.run(prepared)
    runner.close()
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    assert (np.einsum("nd,nd->n", one, other) / lengths).min() > 0.999
    (folder / HALF_FILE).write_bytes(b"")
    with pytest.raises(Exception, match="Export the backbone again"):
        read_manifest(folder, verify=False)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@KINDS
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_a_gpu_gives_the_cpu_s_embeddings(tmp_path: Path, make: Make, half: bool, graphs: bool) -> None:
    folder = make(tmp_path)
    halve(folder)
    write_manifest(folder, read_manifest(folder, verify=True))
    reference = Backbone.open(folder, threads=1)
    plan = ExecutionPlan(4, 4, 1, 32, half=half, graphs=graphs)
    on_gpu = Backbone.open(folder, device="cuda", plan=plan)
    prepared = inputs(reference, 200)
    tolerance = 2e-2 if half else 1e-3
    with ThreadPoolExecutor(4) as pool:
        for some in (prepared, prepared[:1], prepared[:7], prepared):
            wanted = reference.run(some)
            for found in pool.map(on_gpu.run, [some] * 4):
                np.testing.assert_allclose(found, wanted, atol=tolerance)
    assert on_gpu.precision == ("float16" if half else "float32")
    on_gpu.close()


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@KINDS
def test_a_gpu_s_plan_is_measured_and_opens(tmp_path: Path, make: Make) -> None:
    folder = make(tmp_path)
    plan = planned(folder, device="cuda", threads=4).plan
    backbone = Backbone.open(folder, device="cuda", plan=plan)
    assert backbone.run(inputs(backbone, 5)).shape == (5, backbone.spec.dim)
    backbone.close()
