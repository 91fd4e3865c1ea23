"""A process that fits, and the messages to and from it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from adapters.heads.head import Head
from adapters.probe.fit import Dataset, FittedProbe, OneLabel, ProbeConfig, TooCostly
from adapters.processes.child import ChildProcess, child_environment
from adapters.processes.errors import FitFailed
from adapters.processes.frames import Frame, read_frame, write_frame

# Linear algebra gets one thread: the other cores are for serving.
_ONE_THREAD: Final = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class FitProcessDied(Exception):
    """The process ended or was killed before it answered."""


class FitProcess(ChildProcess):
    """A process of adapters.processes.fit_server, which runs one fit at a time. Blocking."""

    def __init__(self, niceness: int) -> None:
        super().__init__(
            "fitting process",
            "adapters.processes.fit_server",
            str(niceness),
            environment=child_environment() | _ONE_THREAD,
            stdout=subprocess.PIPE,
        )

    def wait_until_ready(self) -> None:
        """Wait until the process takes fits. Raises FitProcessDied."""
        self._read()

    def fit(self, dataset: Dataset, config: ProbeConfig) -> FittedProbe:
        """Return the result of the fit. Raises what the fit raised, FitFailed, FitProcessDied."""
        header = {
            "task": dataset.task,
            "fingerprint": dataset.fingerprint,
            "targets": list(dataset.targets),
            "digests": list(dataset.digests),
            "groups": list(dataset.groups),
            "sampled": list(dataset.sampled),
            "names": list(dataset.names.directions),
            "names_transform": dataset.names.transform,
            "config": asdict(config),
        }
        embeddings = np.ascontiguousarray(dataset.embeddings, dtype=np.float32)
        names = dataset.names
        said = np.empty((len(names.directions) + 1, embeddings.shape[1]), np.float32)
        said[0] = 0.0 if names.centre is None else names.centre
        for row, direction in enumerate(names.directions.values(), start=1):
            said[row] = direction
        try:
            write_frame(self.stdin, header, [embeddings, said])
        except OSError as error:
            raise self._died() from error
        return _fitted(*self._read())

    def _read(self) -> Frame:
        frame = read_frame(self.stdout)
        if frame is None:
            raise self._died()
        return frame

    def _died(self) -> FitProcessDied:
        """Return the error once the process has gone, so that it is not taken for a running one."""
        self.kill()
        self.wait()
        return FitProcessDied()


def _fitted(header: Mapping[str, Any], arrays: Sequence[NDArray[Any]]) -> FittedProbe:
    """Return the result that an answer holds, or raise its error."""
    match header.get("error"):
        case None:
            scores, head = arrays
            return FittedProbe(Head.from_bytes(head.tobytes()), header["report"], scores)
        case {"code": OneLabel.code, "detail": str(detail)}:
            raise OneLabel(detail)
        case {"code": TooCostly.code, "predicted": float(predicted), "limit": float(limit)}:
            raise TooCostly(predicted, limit)
        case error:
            raise FitFailed(f"The fit failed: {error}")
