"""`python -m benchmarks.gpu.fine_tune --results FOLDER`: seconds of a fine-tune, and how busy its GPU is.

EfficientNet-Lite0 as timm makes it, with random weights: what it learns is nothing to look at, how long it
takes is. It ends in an export that is compared with torch, as every fine-tune does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np

from adapters.finetune.config import FineTuneConfig
from adapters.finetune.data import Images
from adapters.finetune.export import finish
from adapters.finetune.full_phase import Checkpoint, Progress
from adapters.finetune.model import Model, TrainingSet, embed
from adapters.finetune.trainer import fine_tune
from adapters.heads.head import Head
from adapters.heads.scaling import Scaling
from adapters.probe.fit import ProbeConfig
from benchmarks.gpu.machine import jpeg
from models.arrays import Floats
from models.export.network import Network
from models.spec import PACKAGED, ImageTransform

_LABELS = ("blue", "green", "red")
_EVERY_SECONDS = 0.2


class Utilization:
    """How busy nvidia-smi calls the GPU, in percent, asked for again and again by a thread of its own."""

    def __init__(self) -> None:
        self.percent: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> float | None:
        """The mean of what was seen; None where it could not be asked for."""
        self._ended.set()
        self._thread.join()
        return fmean(self.percent) if self.percent else None

    def _watch(self) -> None:
        query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while not self._ended.wait(_EVERY_SECONDS):
            try:
                done = subprocess.run(query, capture_output=True, text=True, check=True)
            except (OSError, subprocess.CalledProcessError):
                return
            self.percent.append(float(done.stdout.split()[0]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Fine-tunes and prints a line of JSON for each epoch. Raises ExportRefused, Diverged."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.fine_tune", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    import timm

    spec = PACKAGED["efficientnet-lite0"]
    transform = spec.transform
    assert isinstance(transform, ImageTransform)
    body = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0).eval()
    names = _LABELS
    weight = np.zeros((len(names), spec.dim), np.float32)
    scaling = Scaling("none", np.zeros(spec.dim, np.float32), 1.0)
    head = Head("classification", spec.fingerprint, names, scaling, weight, np.zeros(len(names), np.float32))
    labels = np.arange(options.pictures) % len(names)
    training_set = TrainingSet(
        Images(transform, [jpeg(seed) for seed in range(options.pictures)]),
        labels,
        np.arange(options.pictures) % 4 == 3,
    )
    model = Model(body, head, spec.transform).to(options.device)
    config = replace(FineTuneConfig(), epochs=options.epochs, full_size_epochs=1, refit=False)
    last = time.perf_counter()
    seen: Utilization | None = Utilization()
    with (options.results / "training.jsonl").open("a", encoding="utf-8") as file:

        def note(**figures: object) -> None:
            line = json.dumps({"part": "training", **figures})
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()

        def tell(progress: Progress, checkpoint: Checkpoint | None) -> None:
            nonlocal last, seen
            now = time.perf_counter()
            busy = seen.end() if seen is not None else None
            note(phase=progress.phase, epoch=progress.epoch, seconds=now - last, busy_percent=busy)
            last, seen = time.perf_counter(), Utilization()

        outcome = fine_tune(model, training_set, 0.1, config, tell=tell)
        if seen is not None:
            seen.end()
        own = replace(spec, name="timm:random", source="timm")

        def reference(images: Sequence[bytes | str]) -> Floats:
            samples = Images(transform, [one for one in images if isinstance(one, bytes)])
            embeddings: Floats = embed(model, samples, range(len(images))).cpu().numpy()
            return embeddings

        network = Network(own, model.network, reference)
        made = finish(network, model, training_set, names, outcome, ProbeConfig(answer_accuracy=0.9))
        note(pictures=options.pictures, export=made.report["export"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
