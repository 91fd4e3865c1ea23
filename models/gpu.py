"""Runs on a GPU: one thread for all callers, a few fixed shapes, memory that stays where it is."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from models.preprocess import Prepared
from models.spec import IDS, MASK, OUTPUT_NAME, PIXELS, BackboneSpec, ImageTransform

Floats = NDArray[np.float32]

# Each shape that occurs has buffers, and where they are captured a CUDA graph, for good: so there are few.
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_WIDTHS = (16, 32, 64, 128, 256)
_MULTIPLE = 256
_CLOSING_SECONDS = 10.0


class Runner:
    """One session, run for whoever asks. Thread-safe.

    ONNX Runtime keeps CUDA graphs for each thread apart and cannot replay one beside another, so one thread
    runs everything; what callers bring while it runs goes together into its next run. Inputs are filled up to
    the next of a few shapes, whose memory on the device is allocated once.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        spec: BackboneSpec,
        *,
        batch: int,
        device: str = "cuda",
        graphs: bool = False,
    ) -> None:
        """batch: inputs of one run at most. graphs: the session was opened to capture CUDA graphs."""
        self._session = session
        self._spec = spec
        self._batch = batch
        self._device = device
        self._graphs = graphs
        self._shapes: dict[tuple[int, int], _Shape] = {}
        self._lock = threading.Lock()
        self._ready = threading.Condition(self._lock)
        self._waiting: deque[tuple[Sequence[Prepared], Future[Floats]]] = deque()
        self._open = True
        self._thread = threading.Thread(target=self._work, name=f"{spec.name}-gpu", daemon=True)
        self._thread.start()

    def run(self, prepared: Sequence[Prepared]) -> Floats:
        """Embeddings, float32 (n, dim), of n prepared inputs. Raises RuntimeError once it is closed."""
        if not prepared:
            return np.zeros((0, self._spec.dim), np.float32)
        future: Future[Floats] = Future()
        with self._lock:
            if not self._open:
                raise RuntimeError(f"the backbone {self._spec.name} is closed")
            self._waiting.append((prepared, future))
            self._ready.notify()
        return future.result()

    def close(self) -> None:
        """Runs what waits, then frees what is on the device; not while a run hangs."""
        with self._lock:
            self._open = False
            self._ready.notify()
        self._thread.join(_CLOSING_SECONDS)

    def _work(self) -> None:
        while taken := self._take():
            rows = [one for prepared, _ in taken for one in prepared]
            try:
                embeddings = self._embed(rows)
            except BaseException as error:
                for _, future in taken:
                    future.set_exception(error)
                continue
            begin = 0
            for prepared, future in taken:
                end = begin + len(prepared)
                future.set_result(embeddings[begin:end])
                begin = end
        self._shapes.clear()
        del self._session

    def _take(self) -> list[tuple[Sequence[Prepared], Future[Floats]]]:
        """Who waits, as many as fit into a run; at least one, or nobody when there will be no more."""
        with self._lock:
            while not self._waiting:
                if not self._open:
                    return []
                self._ready.wait()
            taken = [self._waiting.popleft()]
            count = len(taken[0][0])
            while self._waiting and count + len(self._waiting[0][0]) <= self._batch:
                taken.append(self._waiting.popleft())
                count += len(taken[-1][0])
            return taken

    def _embed(self, rows: Sequence[Prepared]) -> Floats:
        embeddings = np.zeros((len(rows), self._spec.dim), np.float32)
        for chosen in self._chunks(rows):
            embeddings[chosen] = self._shape_for([rows[row] for row in chosen]).run(
                [rows[row] for row in chosen]
            )
        return embeddings

    def _chunks(self, rows: Sequence[Prepared]) -> Iterator[list[int]]:
        """The rows of one run each; texts in the order of their lengths, so that little is padding."""
        order = list(range(len(rows)))
        if self._spec.kind == "text":
            order.sort(key=lambda row: -len(rows[row]))
        for start in range(0, len(order), self._batch):
            yield order[start : start + self._batch]

    def _shape_for(self, rows: Sequence[Prepared]) -> _Shape:
        count = _next(len(rows), _BATCHES)
        width = 0
        if not isinstance(self._spec.transform, ImageTransform):
            width = min(_next(max(map(len, rows)), _WIDTHS), self._spec.transform.max_tokens)
        shape = self._shapes.get((count, width))
        if shape is None:
            number = len(self._shapes) + 1 if self._graphs else None
            shape = _Shape(self._session, self._spec, count, width, self._device, number)
            self._shapes[count, width] = shape
        return shape


class _Shape:
    """One form of a run: arrays here, their places on the device, and the binding of a session to them."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        spec: BackboneSpec,
        count: int,
        width: int,
        device: str,
        number: int | None,
    ) -> None:
        """width: tokens, 0 for images. number: of the CUDA graph, from 1 on; None to capture none."""
        self._session = session
        self._arrays: dict[str, NDArray[Any]]
        self._pad = 0
        if isinstance(spec.transform, ImageTransform):
            size = spec.transform.size
            self._arrays = {PIXELS: np.zeros((count, 3, size, size), np.float32)}
        else:
            self._pad = spec.transform.pad_id
            self._arrays = {
                IDS: np.full((count, width), self._pad, np.int64),
                MASK: np.zeros((count, width), np.int64),
            }
            # A row of padding alone would be a mean of nothing.
            self._arrays[MASK][:, 0] = 1
        values = onnxruntime.OrtValue
        self._places = {
            name: values.ortvalue_from_numpy(array, device, 0) for name, array in self._arrays.items()
        }
        self._answer = values.ortvalue_from_shape_and_type((count, spec.dim), np.float32, device, 0)
        self._binding = session.io_binding()
        for name, place in self._places.items():
            self._binding.bind_ortvalue_input(name, place)
        self._binding.bind_ortvalue_output(OUTPUT_NAME, self._answer)
        self._options = onnxruntime.RunOptions()
        if number is not None:
            self._options.add_run_config_entry("gpu_graph_id", str(number))

    def run(self, rows: Sequence[Prepared]) -> Floats:
        """Embeddings, float32 (n, dim), of n rows, at most as many as the shape has."""
        self._fill(rows)
        for name, place in self._places.items():
            place.update_inplace(self._arrays[name])
        self._session.run_with_iobinding(self._binding, self._options)
        return np.array(self._answer.numpy()[: len(rows)])

    def _fill(self, rows: Sequence[Prepared]) -> None:
        """What is left of earlier rows behind these is answered too, and not looked at."""
        if PIXELS in self._arrays:
            np.stack(rows, out=self._arrays[PIXELS][: len(rows)])
            return
        ids, mask = self._arrays[IDS], self._arrays[MASK]
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
            ids[row, len(tokens) :] = self._pad
            mask[row, : len(tokens)] = 1
            mask[row, len(tokens) :] = 0


def _next(least: int, steps: Sequence[int]) -> int:
    """The first step that is not below; beyond the last, the next multiple."""
    return next((step for step in steps if step >= least), -(-least // _MULTIPLE) * _MULTIPLE)
