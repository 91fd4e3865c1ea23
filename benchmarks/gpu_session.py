"""`python -m benchmarks.gpu_session`: a bare session run in one way, in a process of its own.

Reads what to run from standard input as JSON, and writes what was measured to standard output. What a way
does to the GPU, a failed capture or an illegal access, ends with the process.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from models.gpu import lowest_cosine
from models.session import Device, open_session
from models.spec import OUTPUT_NAME

ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Asked:
    """graph: the file. feed: an .npz of the graph's inputs. reference: an .npy of the embeddings of a CPU.

    half, channels_last, graphs: see models.session. seconds: of each round.
    """

    graph: str
    feed: str
    reference: str
    device: Device
    half: bool
    channels_last: bool
    graphs: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Found:
    """opening, first: seconds until the session was open, and of its first run, a capture included.

    on_device, with_copies: inputs a second of rounds, with the inputs on the device, and with copies there
    and back. cosine: the least one to the reference.
    """

    opening: float
    first: float
    on_device: list[float]
    with_copies: list[float]
    cosine: float


def measure(asked: Asked) -> Found:
    """Raises what ONNX Runtime raises."""
    feed = dict(np.load(asked.feed))
    reference = np.load(asked.reference)
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
    return Found(opening, first, on_device, with_copies, lowest_cosine(answer.numpy(), reference))


def _rate(run: Callable[[], None], items: int, seconds: float) -> float:
    """Items a second, over a time that is at least so long."""
    begun, runs = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        run()
        runs += 1
    return items * runs / (time.perf_counter() - begun)


def main() -> int:
    """See the module."""
    print(json.dumps(asdict(measure(Asked(**json.load(sys.stdin))))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
