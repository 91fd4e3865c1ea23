"""The report of a benchmark: its numbers, the machine, the versions, and which targets were met."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).resolve().parents[1] / "results"

_PACKAGES = (
    "bentoml",
    "fastapi",
    "numpy",
    "onnxruntime-gpu",
    "pillow",
    "scikit-learn",
    "tokenizers",
    "topwork",
)


def _first_field(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "unknown")


def program() -> str:
    """The module that is run, as `python -m` names it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return "" if spec is None else str(spec.name).removesuffix(".__main__")


def machine() -> dict[str, str]:
    """The machine that the numbers were measured on."""
    return {
        "processor": _first_field("/proc/cpuinfo", "model name"),
        "architecture": platform.machine(),
        "usable cores": str(len(os.sched_getaffinity(0))),
        "memory": _first_field("/proc/meminfo", "MemTotal"),
        "system": platform.platform(),
        "load at start": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one quantity."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def mean(self) -> float:
        """The arithmetic mean."""
        return statistics.fmean(self.values)

    def text(self, form: str = ".2f", unit: str = "") -> str:
        """The median with the least and the greatest value."""
        low, high = min(self.values), max(self.values)
        return f"{self.median:{form}}{unit} ({low:{form}}-{high:{form}}, n={len(self.values)})"


@dataclass(frozen=True, slots=True)
class Target:
    """A promise with the number that was measured."""

    name: str
    measured: float
    relation: Literal["<=", ">="]
    limit: float
    unit: str = ""

    @property
    def met(self) -> bool:
        """True if the measured number is finite and on the right side of the limit."""
        if self.relation == "<=":
            return self.measured <= self.limit
        return self.measured >= self.limit


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned for reading as plain text."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


@dataclass(slots=True)
class Report:
    """Collects one benchmark's tables and targets; `finish` prints, writes and judges them."""

    name: str
    title: str
    started: float = field(default_factory=time.time)
    parts: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=machine)

    def __post_init__(self) -> None:
        # Ended by a supervisor or a time limit, a benchmark takes its service down too, as after Ctrl-C.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def add(self, heading: str, body: str) -> None:
        """A section of Markdown, printed at once so that a long run shows its progress."""
        self.parts.append(f"## {heading}\n\n{body}\n")
        print(f"\n{heading}\n{body}", flush=True)

    def expect(
        self, name: str, measured: float, relation: Literal["<=", ">="], limit: float, unit: str = ""
    ) -> None:
        """Records a target."""
        self.targets.append(Target(name, float(measured), relation, float(limit), unit))

    def finish(self, folder: Path = RESULTS) -> int:
        """Writes <name>.md and <name>.json into the folder; the exit status: 1 if a target was missed."""
        rows = [
            [
                target.name,
                f"{target.measured:.4g}{target.unit}",
                f"{target.relation} {target.limit:.4g}{target.unit}",
                "met" if target.met else "MISSED",
            ]
            for target in self.targets
        ]
        self.add("Targets", table(["target", "measured", "promised", ""], rows))
        facts: Mapping[str, str] = {
            **self.machine,
            **versions(),
            "seconds": f"{time.time() - self.started:.0f}",
        }
        self.add("Measured on", table(["", ""], [[name, value] for name, value in facts.items()]))
        folder.mkdir(parents=True, exist_ok=True)
        day = time.strftime("%Y-%m-%d", time.gmtime(self.started))
        command = " ".join(["python", "-m", program(), *sys.argv[1:]])
        markdown = f"# {self.title}\n\n{day}, `{command}`\n\n"
        (folder / f"{self.name}.md").write_text(markdown + "\n".join(self.parts), encoding="utf-8")
        document = {
            "benchmark": self.name,
            "day": day,
            "machine": self.machine,
            "versions": versions(),
            "targets": [{**asdict(target), "met": target.met} for target in self.targets],
            **self.data,
        }
        (folder / f"{self.name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        missed = [target.name for target in self.targets if not target.met]
        if missed:
            print(f"\nmissed: {'; '.join(missed)}", file=sys.stderr)
        return 1 if missed else 0
