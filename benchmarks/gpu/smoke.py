"""`python -m benchmarks.gpu.smoke [--device cpu]`: whether the backbones run at all, before more is measured.

First completes exports that came without what can be made of the rest. Then says which libraries there are,
and runs both backbones once in float16, beside the CPU. 1 where something is missing or embeddings differ.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.gpu.__main__ import run_session
from benchmarks.gpu.bench import NAMES
from benchmarks.gpu.session import Asked
from models.backbone import Backbone
from models.export.onnx_export import complete
from models.feeds import PROBE_TEXTS, probe_images
from models.runtime.driver import LIBRARIES, gpu_name, load_libraries
from models.spec import FLOAT32, HALF_FILE, MANIFEST_FILE, BackboneSpec
from models.store.exports import find, stored_exports

_MIN_COSINE = 0.9999


def finish_exports() -> None:
    """Makes the float16 graphs and the tables of text backbones that came without."""
    for folder in stored_exports():
        spec = BackboneSpec.from_json(json.loads((folder / MANIFEST_FILE).read_text())["spec"])
        if spec.kind == "text" and spec.precision == FLOAT32 and not (folder / HALF_FILE).exists():
            print(f"completing {spec.name}", flush=True)
            complete(folder, spec, half=True)


def missing_libraries() -> list[str]:
    """Libraries that ONNX Runtime's CUDA provider needs and that cannot be loaded."""
    load_libraries()
    missing = []
    for name in ("libcuda.so.1", *LIBRARIES):
        try:
            ctypes.CDLL(name)
        except OSError as error:
            missing.append(f"{name}: {error}")
    return missing


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.smoke")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = parser.parse_args(arguments).device
    finish_exports()
    print("ONNX Runtime", onnxruntime.__version__, onnxruntime.get_available_providers(), flush=True)
    if device == "cuda":
        print("GPU:", gpu_name())
        if missing := missing_libraries():
            print("cannot be loaded:", *missing, sep="\n  ", file=sys.stderr)
            return 1
    failed = False
    for name in NAMES:
        folder = find(name)
        if folder is None:
            print(f"{name}: there is no complete export of it", file=sys.stderr)
            return 1
        reference = Backbone.open(folder)
        inputs = probe_images() if reference.spec.kind == "image" else PROBE_TEXTS
        prepared = [reference.preprocess(one) for one in inputs]
        with tempfile.TemporaryDirectory(prefix="topwork-smoke-") as scratch:
            feed, embeddings = Path(scratch, "feed.npz"), Path(scratch, "embeddings.npy")
            arrays: dict[str, Any] = reference.feed(prepared)
            np.savez(feed, **arrays)
            np.save(embeddings, reference.run(prepared))
            batches = [(str(feed), str(embeddings))]
            found, error = run_session(
                Asked(str(folder / HALF_FILE), batches, device, True, False, False, 0.1)
            )
        for one in found:
            print(f"{name}: cosine {one.cosine:.6f}, nodes {one.by_provider}, first run {one.first:.2f} s")
            failed |= not one.cosine >= _MIN_COSINE
        if error is not None:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
