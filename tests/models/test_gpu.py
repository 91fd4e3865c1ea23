"""The way that runs take on a GPU: as far as a CPU can tell on the CPU, the rest where there is one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from models.backbone import Backbone, planned
from models.gpu import Runner
from models.half import halve
from models.manifest import read_manifest, write_manifest
from models.plan import Plan
from models.preprocess import Prepared
from models.session import open_session
from models.spec import GRAPH_FILE, HALF_FILE
from tests import tiny

Make = Callable[[Path], Path]
KINDS = pytest.mark.parametrize("make", [tiny.image_export, tiny.text_export])
NEEDS_GPU = pytest.mark.skipif(not Path("/dev/nvidia0").exists(), reason="there is no GPU here")


def inputs(backbone: Backbone, count: int) -> list[Prepared]:
    """Prepared inputs, texts of very different lengths."""
    if backbone.spec.kind == "image":
        return [backbone.preprocess(tiny.picture(seed)) for seed in range(count)]
    return [backbone.preprocess(tiny.sentence(seed, words=seed * 7 % 80 + 1)) for seed in range(count)]


@pytest.fixture(params=[tiny.image_export, tiny.text_export])
def reference(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backbone]:
    make: Make = request.param
    backbone = Backbone.open(make(tmp_path), threads=1)
    yield backbone
    backbone.close()


@pytest.fixture
def runner(reference: Backbone) -> Iterator[Runner]:
    """The runner with a session on the CPU, where memory is bound alike."""
    session = open_session(reference.path / GRAPH_FILE, device="cpu")
    opened = Runner(session, reference.spec, batch=8, device="cpu")
    yield opened
    opened.close()


def test_it_gives_what_unbound_runs_give_whatever_the_shapes(reference: Backbone, runner: Runner) -> None:
    prepared = inputs(reference, 40)
    # Smaller after larger: what is left of earlier rows must not show.
    for some in (prepared, prepared[:1], prepared[:3], prepared[5:10], prepared[::-1], []):
        np.testing.assert_allclose(runner.run(some), reference.run(some), atol=1e-5)


def test_many_threads_get_their_own(reference: Backbone, runner: Runner) -> None:
    prepared = inputs(reference, 24)
    wanted = reference.run(prepared)

    def ask(first: int) -> bool:
        count = first % 5 + 1
        return bool(
            np.allclose(runner.run(prepared[first : first + count]), wanted[first : first + count], atol=1e-5)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, list(range(24)) * 10))


class Counting:
    """A session that notes the rows of each run, and waits before the first."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self.runs = 0
        self.first = threading.Event()
        self.go = threading.Event()

    def io_binding(self) -> onnxruntime.IOBinding:
        return self._session.io_binding()

    def run_with_iobinding(self, *arguments: object) -> None:
        self.runs += 1
        self.first.set()
        self.go.wait(10)
        self._session.run_with_iobinding(*arguments)


def test_what_comes_while_it_runs_goes_into_the_next_run(reference: Backbone) -> None:
    session = Counting(open_session(reference.path / GRAPH_FILE, device="cpu"))
    runner = Runner(session, reference.spec, batch=8, device="cpu")
    (one,) = inputs(reference, 1)
    with ThreadPoolExecutor(9) as pool:
        found = [pool.submit(runner.run, [one])]
        assert session.first.wait(10)
        found += [pool.submit(runner.run, [one]) for _ in range(8)]
        while len(runner._waiting) < 8:
            assert not any(future.done() for future in found)
        session.go.set()
        for future in found:
            np.testing.assert_allclose(future.result(), reference.run([one]), atol=1e-5)
    runner.close()
    assert session.runs == 2


def test_an_error_is_its_callers_and_the_next_run_goes_on(reference: Backbone, runner: Runner) -> None:
    with pytest.raises((ValueError, TypeError)):
        runner.run([np.zeros((2, 2), np.float32)])
    prepared = inputs(reference, 2)
    np.testing.assert_allclose(runner.run(prepared), reference.run(prepared), atol=1e-5)


def test_closed_it_says_so(reference: Backbone) -> None:
    session = open_session(reference.path / GRAPH_FILE, device="cpu")
    runner = Runner(session, reference.spec, batch=8, device="cpu")
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.run(inputs(reference, 1))


@KINDS
def test_half_precision_is_nearly_single(tmp_path: Path, make: Make) -> None:
    folder = make(tmp_path)
    halve(folder)
    write_manifest(folder, read_manifest(folder, verify=True))
    reference = Backbone.open(folder, threads=1)
    assert (folder / HALF_FILE).stat().st_size < 0.7 * (folder / GRAPH_FILE).stat().st_size
    runner = Runner(open_session(folder / HALF_FILE, device="cpu"), reference.spec, batch=8, device="cpu")
    prepared = inputs(reference, 12)
    one, other = runner.run(prepared), reference.run(prepared)
    runner.close()
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    assert (np.einsum("nd,nd->n", one, other) / lengths).min() > 0.999
    (folder / HALF_FILE).write_bytes(b"")
    with pytest.raises(Exception, match="export the backbone again"):
        read_manifest(folder, verify=False)


@pytest.mark.gpu
@NEEDS_GPU
@KINDS
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_a_gpu_gives_the_cpu_s_embeddings(tmp_path: Path, make: Make, half: bool, graphs: bool) -> None:
    folder = make(tmp_path)
    halve(folder)
    write_manifest(folder, read_manifest(folder, verify=True))
    reference = Backbone.open(folder, threads=1)
    plan = Plan(4, 4, 1, 32, half=half, graphs=graphs)
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
@NEEDS_GPU
@KINDS
def test_a_gpu_s_plan_is_measured_and_opens(tmp_path: Path, make: Make) -> None:
    folder = make(tmp_path)
    plan = planned(folder, device="cuda", threads=4).plan
    backbone = Backbone.open(folder, device="cuda", plan=plan)
    assert backbone.run(inputs(backbone, 5)).shape == (5, backbone.spec.dim)
    backbone.close()
