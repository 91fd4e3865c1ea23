"""Exported adapters run by ONNX Runtime alone, beside the service's own answers on the same inputs.

python -m benchmarks.onnx_parity
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks import client, datasets
from benchmarks.datasets import Sample
from benchmarks.report import Report, table
from models.preprocess import ImagePreprocessor, TextPreprocessor
from models.spec import IDS, MASK, PIXELS, ImageTransform, TextTransform

INPUTS = 200
LIMIT = 1e-4
SETS = {"tux-paint": 60, "emoji-google": 400, "trec-coarse": 1_000, "sms-spam": 1_000, "trec-fine": 500}

Floats = NDArray[np.float32]


def _prepared(metadata: dict[str, str], samples: Sequence[Sample]) -> list[dict[str, NDArray[np.generic]]]:
    """Inputs of the graph, one at a time, as the file's own metadata says they are made."""
    said = json.loads(metadata["preprocessing"])
    feeds: list[dict[str, NDArray[np.generic]]] = []
    if metadata["kind"] == "image":
        picture = ImagePreprocessor(ImageTransform(**said))
        for sample in samples:
            assert isinstance(sample.input, bytes)
            feeds.append({PIXELS: picture(sample.input)[None]})
        return feeds
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        file.write_text(metadata["tokenizer"], encoding="utf-8")
        words = TextPreprocessor(TextTransform(**said), file)
        for sample in samples:
            assert isinstance(sample.input, str)
            ids = words(sample.input)[None]
            feeds.append({IDS: ids, MASK: np.ones_like(ids)})
    return feeds


def run_alone(model: bytes, samples: Sequence[Sample]) -> tuple[list[str], Floats]:
    """The labels that the exported file names, and its probabilities, float32 (n, labels)."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    metadata: dict[str, str] = session.get_modelmeta().custom_metadata_map
    rows = [session.run(["probabilities"], feed)[0] for feed in _prepared(metadata, samples)]
    return json.loads(metadata["labels"]), np.concatenate(rows)


def _difference(service: client.Client, data: datasets.DataSet, taught: int) -> tuple[int, int, float]:
    """How many labels the adapter has, how long its file is, and the largest difference of a probability."""
    ordered = datasets.stratified_order(data.samples, 0)
    asked = ordered[-INPUTS:]
    version = service.adapt("parity", ordered[:taught])["version"]
    model = service.request("GET", f"/adapters/parity/versions/{version}/export").content
    labels, alone = run_alone(model, asked)
    served = np.zeros_like(alone)
    for row, prediction in enumerate(service.predict("parity", asked, top_k=len(labels))):
        for entry in prediction["probabilities"]:
            served[row, labels.index(entry["label"])] = entry["probability"]
    service.delete("parity")
    return len(labels), len(model), float(np.abs(served - alone).max())


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes benchmarks/results/onnx_parity.md and .json; 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.onnx_parity", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("TOPWORK_DATA", datasets.DEFAULT_FOLDER))
    )
    options = parser.parse_args(arguments)
    report = Report("onnx_parity", "Exported adapters beside the service")
    rows = []
    with client.running() as server:
        service = client.Client(server, "bench-parity")
        for name, taught in SETS.items():
            labels, size, worst = _difference(service, datasets.load(name, options.data), taught)
            rows.append([name, str(taught), str(labels), f"{size / 1e6:.1f} MB", f"{worst:.1e}"])
            report.data[name] = worst
            report.expect(f"largest difference of probability: {name}", worst, "<=", LIMIT)
        service.close()
    head = ["set", "examples", "labels", "file", "largest difference"]
    report.add(f"Probabilities on {INPUTS} inputs", table(head, rows))
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
