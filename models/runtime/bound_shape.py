"""One shape of a run on a GPU, with buffers at fixed addresses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from models.arrays import Floats, Prepared
from models.runtime.shapes import Shape
from models.spec import IDS, MASK, OUTPUT_NAME, RGB, BackboneSpec, ImageTransform

# Stages of the runner's thread: it waits for inputs, gathers them in one array, copies that to the device,
# runs, and copies the embeddings back.
STAGES = ("wait", "fill", "copy_in", "run", "copy_out")


class BoundShape:
    """One shape of a run: host arrays, their device buffers, and the session's binding to them.

    `first`: the embeddings of the first run, kept until they are compared.
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
        """`number`: CUDA graph id, from 1; None for no capture. `seconds`: by stage, added to by runs."""
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
            # A row of padding alone would be pooled to a mean of no tokens.
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
        """Bytes of the host arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    def filled_with(self, probes: Sequence[Prepared]) -> list[Prepared]:
        """Repeat the probes to fill all rows of the shape; texts are cut to its width."""
        rows = [probes[row % len(probes)] for row in range(self._shape.rows)]
        return [row[: self._shape.width] for row in rows] if self._shape.width else rows

    def run(self, rows: Sequence[Prepared]) -> Floats:
        """Embed n rows, at most those of the shape: float32 (n, dim)."""
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
        """Copy rows into the arrays. Rows left behind them by earlier runs are computed, but ignored."""
        if RGB in self._arrays:
            np.stack(rows, out=self._arrays[RGB][: len(rows)])
            return
        ids, mask = self._arrays[IDS], self._arrays[MASK]
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
            ids[row, len(tokens) :] = self._pad
            mask[row, : len(tokens)] = 1
            mask[row, len(tokens) :] = 0
