"""A bare loop: prepare, embed, next. It runs as its own process and reads orders from its input.

python -m benchmarks.harness.bare_loop BACKBONE FOLDER        # the inputs are the folder's files

A line names one of WAYS, and how often: the answer is the seconds that all inputs took, so many times over. A
line that begins with "each" is answered with the seconds of every single input, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from models.backbone import Backbone
from models.spec import GRAPH_FILE, OUTPUT_NAME
from models.store.exports import find


@dataclass(frozen=True, slots=True)
class Way:
    """loops beside each other, each on its share of the inputs; threads of ONNX Runtime in each; inputs of a
    run.
    """

    loops: int
    threads: int
    batch: int

    @property
    def name(self) -> str:
        """In words."""
        loops = "one loop" if self.loops == 1 else f"{self.loops} loops"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{loops}, {threads}, batches of {self.batch}"


WAYS = {
    way.name: way
    for way in (Way(loops, threads, batch) for loops, threads in ((1, 2), (2, 1)) for batch in (1, 8, 32))
}


def _session(graph: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session with ONNX Runtime's defaults, which keep memory and let waiting threads spin."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


class Loops:
    """The same inputs, prepared and embedded in several plain ways."""

    def __init__(self, backbone: str, inputs: list[bytes]) -> None:
        folder = find(backbone)
        if folder is None:
            raise SystemExit(f"{backbone} is not exported; run `python -m models.export`")
        self._backbone = Backbone.open(folder)
        texts = self._backbone.spec.kind == "text"
        self._inputs: list[bytes | str] = [one.decode() if texts else one for one in inputs]
        self._sessions = {threads: _session(folder / GRAPH_FILE, threads) for threads in (1, 2)}

    def _embed(self, session: onnxruntime.InferenceSession, inputs: list[bytes | str]) -> None:
        prepared = [self._backbone.preprocess(one) for one in inputs]
        session.run([OUTPUT_NAME], self._backbone.feed(prepared))

    def run(self, way: Way, times: int) -> None:
        """Run all inputs this number of times."""
        session = self._sessions[way.threads]
        batches = [
            self._inputs[start : start + way.batch] for start in range(0, len(self._inputs), way.batch)
        ] * times
        if way.loops == 1:
            for batch in batches:
                self._embed(session, batch)
            return
        with ThreadPoolExecutor(way.loops) as pool:
            list(pool.map(lambda batch: self._embed(session, batch), batches))

    def each(self, way: Way, times: int) -> list[float]:
        """Seconds of every input alone, one after the other."""
        session = self._sessions[way.threads]
        found = []
        for one in self._inputs * times:
            begin = time.perf_counter()
            self._embed(session, [one])
            found.append(time.perf_counter() - begin)
        return found


def main() -> int:
    """Reads the inputs, tries every way once, says "ready", and answers lines."""
    backbone, folder = sys.argv[1:]
    loops = Loops(backbone, [path.read_bytes() for path in sorted(Path(folder).iterdir())])
    for way in WAYS.values():
        loops.run(way, 1)
    print("ready", flush=True)
    for line in sys.stdin:
        what, times, name = line.strip().split(" ", 2)
        if what == "each":
            print(json.dumps(loops.each(WAYS[name], int(times))), flush=True)
            continue
        begin = time.perf_counter()
        loops.run(WAYS[name], int(times))
        print(time.perf_counter() - begin, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
