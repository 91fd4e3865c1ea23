"""`python -m benchmarks.gpu.session`: a bare session run in one way, in a process of its own.

Reads what to run from standard input as JSON, and writes a line of JSON for each batch. What a way does to
the GPU, a failed capture or an illegal access, ends with the process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from models.runtime.cuda import lowest_cosine
from models.runtime.session import Device, open_session
from models.spec import OUTPUT_NAME

ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Asked:
    """graph: the file. batches: of each, an .npz of the graph's inputs and an .npy of a CPU's embeddings.

    half, channels_last, graphs: see models.runtime.session. seconds: of each round.
    """

    graph: str
    batches: list[tuple[str, str]]
    device: Device
    half: bool
    channels_last: bool
    graphs: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Found:
    """Measurements of one batch.

    opening, first: seconds until the session was open, and of its first run, a capture included.
    on_device, with_copies: inputs a second of rounds, with the inputs on the device, and with copies there
    and back. cosine: the least one to the reference. by_provider: nodes that each execution provider runs.
    memory: bytes of the device that are in use then; None where that cannot be asked.
    """

    opening: float
    first: float
    on_device: list[float]
    with_copies: list[float]
    cosine: float
    by_provider: dict[str, int]
    memory: int | None


def measure(asked: Asked, feed: Mapping[str, NDArray[Any]], reference: NDArray[np.float32]) -> Found:
    """Measure one batch in its own session, as images are served. Raises what ONNX Runtime raises."""
    count = len(reference)
    begun = time.perf_counter()
    session = open_session(
        Path(asked.graph),
        device=asked.device,
        half=asked.half,
        channels_last=asked.channels_last,
        graphs=asked.graphs,
    )
    opening = time.perf_counter() - begun
    values = onnxruntime.OrtValue
    places = {name: values.ortvalue_from_numpy(array, asked.device, 0) for name, array in feed.items()}
    answer = values.ortvalue_from_shape_and_type(reference.shape, np.float32, asked.device, 0)
    binding = session.io_binding()
    for name, place in places.items():
        binding.bind_ortvalue_input(name, place)
    binding.bind_ortvalue_output(OUTPUT_NAME, answer)

    def run() -> None:
        session.run_with_iobinding(binding)

    def run_with_copies() -> None:
        for name, place in places.items():
            place.update_inplace(feed[name])
        session.run_with_iobinding(binding)
        answer.numpy()

    begun = time.perf_counter()
    run()
    first = time.perf_counter() - begun
    on_device = [_rate(run, count, asked.seconds) for _ in range(ROUNDS)]
    with_copies = [_rate(run_with_copies, count, asked.seconds) for _ in range(ROUNDS)]
    cosine = lowest_cosine(answer.numpy(), reference)
    return Found(opening, first, on_device, with_copies, cosine, _by_provider(session), _memory(asked.device))


def _by_provider(session: onnxruntime.InferenceSession) -> dict[str, int]:
    """Nodes that each execution provider runs. A node on the CPU in the middle costs two copies."""
    try:
        parts = session.get_provider_graph_assignment_info()
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail:
        return {}
    return dict(Counter(part.ep_name for part in parts for _ in part.get_nodes()))


def _memory(device: Device) -> int | None:
    """Bytes of the device that are in use, by all processes."""
    if device == "cpu":
        return None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) << 20
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None


def _rate(run: Callable[[], None], items: int, seconds: float) -> float:
    """Items a second over at least this duration."""
    begun, runs = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        run()
        runs += 1
    return items * runs / (time.perf_counter() - begun)


def main() -> int:
    """See the module."""
    asked = Asked(**json.load(sys.stdin))
    for feed, reference in asked.batches:
        print(json.dumps(asdict(measure(asked, dict(np.load(feed)), np.load(reference)))), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
