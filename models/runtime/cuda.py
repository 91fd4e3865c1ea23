"""Runs on a GPU, with one thread for all callers, a few fixed shapes, and buffers at fixed addresses."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np

from models.arrays import Floats, Prepared
from models.errors import DomainError
from models.runtime import driver
from models.runtime.autotune import ExecutionPlan
from models.runtime.bound_shape import STAGES, BoundShape
from models.runtime.device_access import DEVICE, DeviceAccess
from models.runtime.progress import PATIENCE, ThreadProgress
from models.runtime.session import Session, open_session
from models.runtime.shapes import Shape, runs_of, shapes_for
from models.spec import BackboneSpec

_BACKLOG = 2  # maximum waiting inputs, as a multiple of those of the largest run
# Minimum cosine between the embeddings of a shape when opened and after all other shapes were captured.
_MIN_COSINE = 0.9999
_CLOSING_SECONDS = 10.0


class DeviceLost(DomainError):
    """The GPU has failed and this process cannot recover; only a new process can use it."""

    code = "device_lost"


class CudaRunner:
    """A network on a GPU that runs the inputs of all callers. Thread-safe.

    ONNX Runtime keeps CUDA graphs per thread and cannot replay two at once, so one thread runs everything;
    inputs that arrive during a run go together into the next. They are padded to one of a few shapes. All
    shapes are allocated, and captured if requested, before the first run: opening one while serving would
    take seconds, and a run during a capture fails.

    `progress`: that of the thread. `lost`: whether the device has failed. `seconds`: time that the thread has
    spent in each of STAGES since the shapes were opened.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        open_session: Callable[[], Session],
        shapes: Sequence[Shape],
        probes: Sequence[Prepared],
        *,
        device: str = "cuda",
        graphs: bool = False,
        access: DeviceAccess = DEVICE,
        is_lost: Callable[[], bool] = lambda: False,
    ) -> None:
        """Open all shapes. Errors from opening them are raised.

        `open_session`: called once for texts, and once per shape for images, because a session plans its
        convolutions anew whenever the number of images changes. `shapes`: from `shapes_for`. `probes`: at
        least one prepared input to test each shape. `graphs`: the sessions capture CUDA graphs. `is_lost()`:
        called after a failed run, to ask whether the device has failed for good.
        """
        self.progress = ThreadProgress()
        self.lost = False
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._spec = spec
        self._open_session = open_session
        self._shapes = shapes
        self._most = max(shape.rows for shape in shapes)
        self._device = device
        self._graphs = graphs
        self._access = access
        self._is_lost = is_lost
        self._bound: dict[Shape, BoundShape] = {}
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[tuple[Sequence[Prepared], Future[Floats]]] = deque()
        self._rows = 0
        self._open = True
        opened: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._work, args=(opened, probes), name=f"{spec.name}-gpu", daemon=True
        )
        self._thread.start()
        opened.result()

    @property
    def nbytes(self) -> int:
        """Bytes of the bound host arrays; the device holds as much, plus the memory that runs need."""
        return sum(bound.nbytes for bound in self._bound.values())

    def run(self, prepared: Sequence[Prepared]) -> Floats:
        """Embed n prepared inputs: float32 (n, dim). Raises as `submit` does, or the error of the run."""
        return self.submit(prepared).result()

    def submit(self, prepared: Sequence[Prepared]) -> Future[Floats]:
        """Return a future for the result of `run`. Blocks while inputs for two runs are waiting.

        The future's callbacks run in the runner's thread. Raises RuntimeError if the runner is closed,
        DeviceLost if the device has failed.
        """
        future: Future[Floats] = Future()
        if not prepared:
            future.set_result(np.zeros((0, self._spec.dim), np.float32))
            return future
        with self._lock:
            while self._open and self._rows and self._rows + len(prepared) > _BACKLOG * self._most:
                self._changed.wait()
            if self.lost:
                raise DeviceLost(f"the GPU of the backbone {self._spec.name} has failed")
            if not self._open:
                raise RuntimeError(f"the backbone {self._spec.name} is closed")
            self._waiting.append((prepared, future))
            self._rows += len(prepared)
            self._changed.notify_all()
        return future

    def close(self) -> None:
        """Run the waiting inputs, then free the device's memory. Returns after 10 s even if a run hangs."""
        with self._lock:
            self._open = False
            self._changed.notify_all()
        self._thread.join(_CLOSING_SECONDS)

    def _work(self, opened: Future[None], probes: Sequence[Prepared]) -> None:
        try:
            self._open_shapes(probes)
        except BaseException as error:
            self._bound.clear()
            opened.set_exception(error)
            return
        self.seconds.update(dict.fromkeys(STAGES, 0.0))
        opened.set_result(None)
        while taken := self._take():
            rows = [one for prepared, _ in taken for one in prepared]
            self.progress.steps += 1
            self.progress.allowed = PATIENCE
            try:
                embeddings = self._embed(rows)
            except BaseException as error:
                self._fail(taken, error)
                continue
            finally:
                self.progress.allowed = 0.0
                self.progress.busy = False
                self.progress.steps += 1
            begin = 0
            for prepared, future in taken:
                end = begin + len(prepared)
                future.set_result(embeddings[begin:end])
                begin = end
        self._bound.clear()

    def _open_shapes(self, probes: Sequence[Prepared]) -> None:
        """Allocate and capture every shape, then check that each still gives its first embeddings.

        A captured graph keeps using what its session planned for it.
        """
        session = None
        for number, shape in enumerate(self._shapes, start=1):
            if session is None or self._spec.kind == "image":
                with self._access.shared():
                    session = self._open_session()
            with self._access.alone() if self._graphs else self._access.shared():
                graph = number if self._graphs else None
                bound = BoundShape(session, self._spec, shape, self._device, graph, self.seconds)
                bound.first = bound.run(bound.filled_with(probes))
            self._bound[shape] = bound
        for shape, bound in self._bound.items():
            assert bound.first is not None
            with self._access.shared():
                again = bound.run(bound.filled_with(probes))
            if not lowest_cosine(again, bound.first) >= _MIN_COSINE:
                raise RuntimeError(f"runs of {shape} give other embeddings once other shapes are captured")
            bound.first = None

    def _take(self) -> list[tuple[Sequence[Prepared], Future[Floats]]]:
        """Wait for requests and take as many as fit into one run, at least one; none once closed."""
        with self._lock:
            begun = time.perf_counter()
            while not self._waiting:
                if not self._open:
                    return []
                self._changed.wait()
            self.seconds["wait"] += time.perf_counter() - begun
            taken = [self._waiting.popleft()]
            count = len(taken[0][0])
            while self._waiting and count + len(self._waiting[0][0]) <= self._most:
                taken.append(self._waiting.popleft())
                count += len(taken[-1][0])
            self._rows -= count
            self.progress.busy = True
            self._changed.notify_all()
            return taken

    def _fail(self, taken: Sequence[tuple[Sequence[Prepared], Future[Floats]]], error: BaseException) -> None:
        """Fail the requests of a run, and all waiting ones too if the device is lost."""
        taken = list(taken)
        if self._is_lost():
            with self._lock:
                self.lost, self._open = True, False
                taken += self._waiting
                self._waiting.clear()
                self._changed.notify_all()
            lost = DeviceLost(f"the GPU of the backbone {self._spec.name} has failed: {error}")
            lost.__cause__, error = error, lost
        for _, future in taken:
            future.set_exception(error)

    def _embed(self, rows: Sequence[Prepared]) -> Floats:
        embeddings = np.zeros((len(rows), self._spec.dim), np.float32)
        for shape, chosen in runs_of(rows, self._shapes):
            with self._access.shared():
                embeddings[chosen] = self._bound[shape].run([rows[row] for row in chosen])
        return embeddings


def open_runner(
    spec: BackboneSpec,
    graph: Path | bytes,
    plan: ExecutionPlan,
    probes: Sequence[Prepared],
    *,
    few: bool = False,
) -> CudaRunner:
    """Open a graph on the GPU as the plan says. `few`: only few shapes, for the network of one tenant."""
    return CudaRunner(
        spec,
        partial(
            open_session,
            graph,
            device="cuda",
            graphs=plan.graphs,
            half=plan.half,
            channels_last=plan.channels_last,
        ),
        shapes_for(spec, plan.batch, few=few),
        probes,
        graphs=plan.graphs,
        is_lost=driver.is_lost,
    )


def lowest_cosine(one: Floats, other: Floats) -> float:
    """The lowest cosine between corresponding rows of two arrays (n, dim); NaN if a value is NaN."""
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float((np.einsum("nd,nd->n", one, other) / np.maximum(norms, 1e-12)).min())
