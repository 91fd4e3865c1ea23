"""What the parts of the GPU benchmark share: the device, the report, and the file of figures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness.report import Report
from models.runtime.session import Device, DeviceUnavailable

# Backbones, with the inputs at once.
NAMES = {"efficientnet-lite0": (1, 8, 32, 128, 256), "minilm-l6-v2": (1, 32, 128, 512, 1024)}


class Bench:
    """The state that all parts share; their figures are appended to those of earlier runs."""

    def __init__(self, device: Device, seconds: float, results: Path, report: Report) -> None:
        self.device = device
        self.seconds = seconds
        self.report = report
        self.failed: list[str] = []
        self._file = None
        if device == "cuda":
            self._file = (results / "gpu.jsonl").open("a+", encoding="utf-8")
            self._file.seek(0)
            for line in self._file:
                figures = json.loads(line)
                report.data.setdefault(figures.pop("part"), []).append(figures)

    def counts(self, name: str) -> Sequence[int]:
        """Inputs at once: few in a rehearsal, which is to end."""
        return NAMES[name] if self.device == "cuda" else NAMES[name][:2]

    def note(self, part: str, **figures: Any) -> None:
        """One figure, or some that belong together."""
        line = json.dumps({"part": part, **figures})
        print(line, flush=True)
        self.report.data.setdefault(part, []).append(figures)
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Run the part; its failure does not stop the others."""
        begun = time.perf_counter()
        try:
            yield
        except DeviceUnavailable:
            raise
        except Exception as error:
            self.failed.append(name)
            self.note(name, error=f"{type(error).__name__}: {error}")
        self.note(name, seconds=time.perf_counter() - begun)
