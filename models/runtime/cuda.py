"""Runs on a GPU: one thread for all callers, a few fixed shapes, memory that stays where it is."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from models.arrays import Floats
from models.preprocess.preprocessor import Prepared
from models.runtime.progress import PATIENCE, ThreadProgress
from models.spec import IDS, MASK, OUTPUT_NAME, RGB, BackboneSpec, ImageTransform

# Rows of a run. Each shape has buffers, and where they are captured a CUDA graph, for good: so there are few.
_IMAGE_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
_TEXT_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_WIDTHS = (16, 32, 64, 128, 256)
# Of a tenant's fine-tuned network, of which there are many.
_FEW_ROWS = (1, 8, 32)
# Of a run, padding included: short texts are run in larger numbers.
_TOKENS_PER_RUN = 32_768
# Inputs that wait for the next run are at most so many times as many as fit into one.
_BACKLOG = 2
# Between what a captured graph gives for the same inputs at first, and once all others are captured.
_MIN_COSINE = 0.9999
_CLOSING_SECONDS = 10.0

# What the runner's thread does: it waits for inputs, copies them together, copies them to the device, runs,
# and copies the embeddings back.
STAGES = ("wait", "fill", "copy_in", "run", "copy_out")


class DeviceLost(RuntimeError):
    """The GPU has failed in a way that this process cannot recover from; only a new process can use it."""

    code = "device_lost"


class Shape(NamedTuple):
    """Rows of a run, and tokens of each; images have a width of 0."""

    rows: int
    width: int

    @property
    def size(self) -> int:
        """Tokens, or images."""
        return self.rows * max(1, self.width)


def shapes_for(spec: BackboneSpec, batch: int, *, few: bool = False) -> tuple[Shape, ...]:
    """The shapes of a backbone's runs, the largest first. batch: rows of one run, at most."""
    images = isinstance(spec.transform, ImageTransform)
    steps = _FEW_ROWS if few else _IMAGE_ROWS if images else _TEXT_ROWS
    rows = {*(step for step in steps if step < batch), batch}
    if isinstance(spec.transform, ImageTransform):
        found = {Shape(count, 0) for count in rows}
    else:
        longest = spec.transform.max_tokens
        widths = {*(width for width in _WIDTHS if width < longest), longest}
        found = {
            Shape(count, width)
            for count in rows
            for width in widths
            if count == 1 or count * width <= _TOKENS_PER_RUN
        }
    return tuple(sorted(found, key=lambda shape: (-shape.size, -shape.rows)))


class Access:
    """Who may use the device: many at once, or one alone, who is let in before those that come later.

    CUDA forbids to allocate memory or to copy it in any thread while a graph is captured in another one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0
        self._alone = False
        self._waiting = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Beside others that share it. Not to be asked for twice by one thread."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Once everybody else is done, and before anybody else begins."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._alone and not self._users)
            self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


DEVICE = Access()
"""To the GPU of this process."""


class CudaRunner:
    """A network on a GPU, run for whoever asks. Thread-safe.

    ONNX Runtime keeps CUDA graphs for each thread apart and cannot replay one beside another, so one thread
    runs everything; what callers bring while it runs goes together into its next run. Inputs are filled up to
    the next of a few shapes. All of these are allocated, and captured where that is wanted, before the first
    run: what is new in the middle of service takes seconds, and a run beside a capture fails.

    turn: what its thread is at. lost: whether the device is. seconds: what its thread has spent with each of
    STAGES since the shapes are open.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        open_session: Callable[[], onnxruntime.InferenceSession],
        shapes: Sequence[Shape],
        probes: Sequence[Prepared],
        *,
        device: str = "cuda",
        graphs: bool = False,
        access: Access = DEVICE,
        is_lost: Callable[[], bool] = lambda: False,
    ) -> None:
        """Opens all shapes. Raises what that raises.

        open_session: called once for texts, and for images once for each shape: a convolution is planned anew
        whenever a session meets another number of images. shapes: as shapes_for gives them. probes: prepared
        inputs, at least one, with which they are tried. graphs: the sessions capture CUDA graphs. is_lost():
        whether the device has failed for good, asked when a run has failed.
        """
        self.turn = ThreadProgress()
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
        self._bound: dict[Shape, _Bound] = {}
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
        """Of what is bound here; on the device there is as much, and what the runs need."""
        return sum(bound.nbytes for bound in self._bound.values())

    def run(self, prepared: Sequence[Prepared]) -> Floats:
        """Embeddings, float32 (n, dim), of n prepared inputs. Raises as submit does, or what a run raises."""
        return self.submit(prepared).result()

    def submit(self, prepared: Sequence[Prepared]) -> Future[Floats]:
        """What run gives, later. Waits while enough for two runs is waiting.

        What is called when it is done is called in the runner's own thread. Raises RuntimeError once it is
        closed, DeviceLost once the device is.
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
        """Runs what waits, then frees what is on the device; not while a run hangs."""
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
            self.turn.steps += 1
            self.turn.allowed = PATIENCE
            try:
                embeddings = self._embed(rows)
            except BaseException as error:
                self._fail(taken, error)
                continue
            finally:
                self.turn.allowed = 0.0
                self.turn.busy = False
                self.turn.steps += 1
            begin = 0
            for prepared, future in taken:
                end = begin + len(prepared)
                future.set_result(embeddings[begin:end])
                begin = end
        self._bound.clear()

    def _open_shapes(self, probes: Sequence[Prepared]) -> None:
        """Allocates and captures every shape, and looks whether each still answers as it did at first.

        A graph that was captured goes on using what its session planned for it.
        """
        session = None
        for number, shape in enumerate(self._shapes, start=1):
            if session is None or self._spec.kind == "image":
                with self._access.shared():
                    session = self._open_session()
            with self._access.alone() if self._graphs else self._access.shared():
                graph = number if self._graphs else None
                bound = _Bound(session, self._spec, shape, self._device, graph, self.seconds)
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
        """Who waits, as many as fit into a run; at least one, or nobody when there will be no more."""
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
            self.turn.busy = True
            self._changed.notify_all()
            return taken

    def _fail(self, taken: Sequence[tuple[Sequence[Prepared], Future[Floats]]], error: BaseException) -> None:
        """Tells those whose run failed, and everybody where there will be no other one."""
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
        for shape, chosen in self._runs(rows):
            with self._access.shared():
                embeddings[chosen] = self._bound[shape].run([rows[row] for row in chosen])
        return embeddings

    def _runs(self, rows: Sequence[Prepared]) -> Iterator[tuple[Shape, list[int]]]:
        """The rows of one run each; texts in the order of their lengths, so that little is padding."""
        order = list(range(len(rows)))
        if self._spec.kind == "image":
            while order:
                chosen, order = order[: self._most], order[self._most :]
                yield self._shape_for(len(chosen), 0), chosen
            return
        order.sort(key=lambda row: -len(rows[row]))
        while order:
            # The first is the longest.
            widest = self._shape_for(1, len(rows[order[0]])).width
            most = max(shape.rows for shape in self._shapes if shape.width == widest)
            chosen, order = order[:most], order[most:]
            yield self._shape_for(len(chosen), widest), chosen

    def _shape_for(self, rows: int, width: int) -> Shape:
        """The smallest one that holds them."""
        fitting = [shape for shape in self._shapes if shape.rows >= rows and shape.width >= width]
        return min(fitting, key=lambda shape: (shape.width, shape.rows))


class _Bound:
    """One shape of a run: arrays here, their places on the device, and the binding of a session to them.

    first: what its first run gave, until that was compared.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        spec: BackboneSpec,
        shape: Shape,
        device: str,
        number: int | None,
        seconds: dict[str, float],
    ) -> None:
        """number: of the CUDA graph, from 1 on; None to capture none. seconds: by stage, added to."""
        self.first: Floats | None = None
        self._seconds = seconds
        self._session = session
        self._shape = shape
        self._arrays: dict[str, NDArray[Any]]
        self._pad = 0
        if isinstance(spec.transform, ImageTransform):
            size = spec.transform.size
            self._arrays = {RGB: np.zeros((shape.rows, size, size, 3), np.uint8)}
        else:
            self._pad = spec.transform.pad_id
            self._arrays = {
                IDS: np.full(shape, self._pad, np.int64),
                MASK: np.zeros(shape, np.int64),
            }
            # A row of padding alone would be a mean of nothing.
            self._arrays[MASK][:, 0] = 1
        values = onnxruntime.OrtValue
        self._places = {
            name: values.ortvalue_from_numpy(array, device, 0) for name, array in self._arrays.items()
        }
        self._answer = values.ortvalue_from_shape_and_type((shape.rows, spec.dim), np.float32, device, 0)
        self._binding = session.io_binding()
        for name, place in self._places.items():
            self._binding.bind_ortvalue_input(name, place)
        self._binding.bind_ortvalue_output(OUTPUT_NAME, self._answer)
        self._options = onnxruntime.RunOptions()
        if number is not None:
            self._options.add_run_config_entry("gpu_graph_id", str(number))

    @property
    def nbytes(self) -> int:
        """Of the arrays here."""
        return sum(array.nbytes for array in self._arrays.values())

    def filled_with(self, probes: Sequence[Prepared]) -> list[Prepared]:
        """As many rows as it has, of the probes in turn, texts no longer than it is wide."""
        rows = [probes[row % len(probes)] for row in range(self._shape.rows)]
        return [row[: self._shape.width] for row in rows] if self._shape.width else rows

    def run(self, rows: Sequence[Prepared]) -> Floats:
        """Embeddings, float32 (n, dim), of n rows, at most as many as the shape has."""
        times = [time.perf_counter()]
        self._fill(rows)
        times.append(time.perf_counter())
        for name, place in self._places.items():
            place.update_inplace(self._arrays[name])
        times.append(time.perf_counter())
        self._session.run_with_iobinding(self._binding, self._options)
        times.append(time.perf_counter())
        embeddings = np.array(self._answer.numpy()[: len(rows)])
        times.append(time.perf_counter())
        for stage, (begun, done) in zip(STAGES[1:], pairwise(times), strict=True):
            self._seconds[stage] += done - begun
        return embeddings

    def _fill(self, rows: Sequence[Prepared]) -> None:
        """What is left of earlier rows behind these is answered too, and not looked at."""
        if RGB in self._arrays:
            np.stack(rows, out=self._arrays[RGB][: len(rows)])
            return
        ids, mask = self._arrays[IDS], self._arrays[MASK]
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
            ids[row, len(tokens) :] = self._pad
            mask[row, : len(tokens)] = 1
            mask[row, len(tokens) :] = 0


def lowest_cosine(one: Floats, other: Floats) -> float:
    """Between the rows of two arrays, (n, dim); NaN where a number is."""
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float((np.einsum("nd,nd->n", one, other) / np.maximum(norms, 1e-12)).min())
