"""A loop with nothing around it: decode, embed, next. In a process of its own, told by lines on its input.

Each line names a variant of VARIANTS; the answer is the seconds that one pass over all images took.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime

from models.exported import find
from models.manifest import read_manifest
from models.preprocess import ImagePreprocessor
from models.spec import GRAPH_FILE, OUTPUT_NAME, PIXELS, ImageTransform

BACKBONE = "efficientnet-lite0"


def _session(graph: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


class Loops:
    """The same images, decoded and embedded in several plain ways; each takes seconds from start to end."""

    def __init__(self, images: list[bytes]) -> None:
        folder = find(BACKBONE)
        if folder is None:
            raise SystemExit(f"{BACKBONE} is not exported; run `python -m models.export`")
        transform = read_manifest(folder, verify=False).transform
        assert isinstance(transform, ImageTransform)
        self._images = images
        self._prepare = ImagePreprocessor(transform)
        self._one = _session(folder / GRAPH_FILE, 1)
        self._two = _session(folder / GRAPH_FILE, 2)

    def _embed(self, session: onnxruntime.InferenceSession, images: list[bytes]) -> None:
        pixels = np.stack([self._prepare(image) for image in images])
        session.run([OUTPUT_NAME], {PIXELS: pixels})

    def _loop(self, session: onnxruntime.InferenceSession, batch: int) -> None:
        for start in range(0, len(self._images), batch):
            self._embed(session, self._images[start : start + batch])

    def one_thread(self) -> None:
        """One image at a time, ONNX Runtime on one thread."""
        self._loop(self._one, 1)

    def two_threads(self) -> None:
        """One image at a time, ONNX Runtime on two threads."""
        self._loop(self._two, 1)

    def batches(self) -> None:
        """Eight images at a time, ONNX Runtime on two threads."""
        self._loop(self._two, 8)

    def two_loops(self) -> None:
        """Two loops beside each other on half of the images, ONNX Runtime on one thread."""
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda image: self._embed(self._one, [image]), self._images))


VARIANTS: dict[str, Callable[[Loops], None]] = {
    "one loop, 1 thread": Loops.one_thread,
    "one loop, 2 threads": Loops.two_threads,
    "one loop, batches of 8, 2 threads": Loops.batches,
    "two loops, 1 thread each": Loops.two_loops,
}


def main() -> int:
    """Reads the images of the folder named as the first argument, then a variant a line."""
    loops = Loops([path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())])
    for variant in VARIANTS.values():
        variant(loops)
    print("ready", flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        VARIANTS[line.strip()](loops)
        print(time.perf_counter() - begin, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
