"""Exported adapters run by examples/run_export.py, beside the service's own answers on the same raw inputs.

python -m benchmarks.serving.onnx_parity
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.data import datasets
from benchmarks.data.archives import DEFAULT_FOLDER
from benchmarks.data.datasets import Sample
from benchmarks.harness import client
from benchmarks.harness.report import Report, table

INPUTS = 200
LIMIT = 1e-4
SETS = {"tux-paint": 60, "emoji-google": 400, "trec-coarse": 1_000, "sms-spam": 1_000, "trec-fine": 500}
PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "run_export.py"


def run_alone(model: bytes, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The program's answers."""
    with tempfile.TemporaryDirectory(prefix="topwork-parity-") as name:
        folder = Path(name)
        (folder / "model.onnx").write_bytes(model)
        files = [f"{place}.input" for place in range(len(samples))]
        for file, sample in zip(files, samples, strict=True):
            data = sample.input.encode() if isinstance(sample.input, str) else sample.input
            (folder / file).write_bytes(data)
        command = [sys.executable, "-I", str(PROGRAM), "model.onnx", *files]
        said = subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout
    return [json.loads(line) for line in said.splitlines()]


def _difference(service: client.Client, data: datasets.DataSet, taught: int) -> tuple[int, int, float, int]:
    """Labels of the adapter, bytes of its file, the largest difference of a probability, other decisions."""
    ordered = datasets.stratified_order(data.samples, 0)
    asked = ordered[-INPUTS:]
    version = service.adapt("parity", ordered[:taught])["version"]
    model = service.request("GET", f"/adapters/parity/versions/{version}/export").content
    alone = run_alone(model, asked)
    labels = len(alone[0]["probabilities"])
    served = service.predict("parity", asked, top_k=labels)
    service.delete("parity")
    worst, other = 0.0, 0
    for theirs, ours in zip(alone, served, strict=True):
        other += (theirs["label"], theirs["abstained"]) != (ours["label"], ours["abstained"])
        for entry in ours["probabilities"]:
            worst = max(worst, abs(theirs["probabilities"][entry["label"]] - entry["probability"]))
    return labels, len(model), worst, other


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes benchmarks/results/onnx_parity.md and .json; 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.onnx_parity", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TOPWORK_DATA", DEFAULT_FOLDER)))
    options = parser.parse_args(arguments)
    report = Report("onnx_parity", "Exported adapters beside the service")
    rows = []
    with client.running() as server:
        service = client.Client(server, "bench-parity")
        for name, taught in SETS.items():
            data = datasets.load(name, options.data)
            labels, size, worst, other = _difference(service, data, taught)
            rows.append([name, str(taught), str(labels), f"{size / 1e6:.1f} MB", f"{worst:.1e}", str(other)])
            report.data[name] = {"largest difference": worst, "other decisions": other}
            report.expect(f"largest difference of probability: {name}", worst, "<=", LIMIT)
            report.expect(f"other labels or abstentions: {name}", other, "<=", 0)
        service.close()
    head = ["set", "examples", "labels", "file", "largest difference", "other decisions"]
    report.add(f"Probabilities on {INPUTS} inputs", table(head, rows))
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
