"""Export of a fine-tuned network to ONNX with its head, checked against torch. Requires torch."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters.finetune.data import Tensors, batches, seeded
from adapters.finetune.model import Model, TrainingSet
from adapters.finetune.trainer import FineTuned
from adapters.heads.abstention import fit_abstention
from adapters.heads.answers import answers_of, costs_of
from adapters.heads.head import Head, directions_for, smoothed, softmax, storable
from adapters.heads.novelty import fit_region
from adapters.heads.scaling import Scaling
from adapters.probe.calibration import measures, temperatures
from adapters.probe.calibration.judgement import judge
from adapters.probe.calibration.report import CrossValidated, report_of
from adapters.probe.fit import ProbeConfig
from models.arrays import Floats, Integers, Prepared
from models.backbone import Backbone
from models.export.network import Network
from models.export.onnx_export import write
from models.sources.source import ExportRefused
from models.spec import FLOAT32, GRAPH_FILE, INT4, BackboneSpec

_PROBES = 512  # inputs on which ONNX Runtime has to agree with torch
_LARGEST_DIFFERENCE = 1e-3  # largest accepted difference of a logit
_AT_ONCE = 16  # batch size


@dataclass(frozen=True, slots=True)
class TunedVersion:
    """A fine-tuned version, ready to be published."""

    head: Head  # fits the embeddings of this network only
    spec: BackboneSpec  # spec of the network, with its own fingerprint
    onnx: bytes  # the network's graph, from the backbone's inputs to embeddings
    report: dict[str, Any]  # JSON-able, measured on the held-out rows
    scores: Floats  # float32 (n,), see FittedProbe


def finish(
    network: Network,
    model: Model,
    training_set: TrainingSet,
    names: tuple[str, ...],
    outcome: FineTuned,
    config: ProbeConfig,
) -> TunedVersion:
    """Export the network, and fit and measure its head.

    Raises ExportRefused if ONNX Runtime and torch give different answers.
    """
    # What was trained does not fit into 4 bits again.
    precision = FLOAT32 if network.spec.precision == INT4 else network.spec.precision
    spec = replace(network.spec, weights_sha256=weights_sha256(model), precision=precision)
    model.cpu()
    with tempfile.TemporaryDirectory(prefix="topwork-tuned-") as scratch:
        folder = Path(scratch)
        # The classifier belongs to the embeddings of the original network.
        write(replace(network, spec=spec, forward=model.network, classes=None), folder)
        backbone = Backbone.open(folder)
        head, report, scores = _measured(model, backbone, training_set, names, config, outcome.logits)
        report |= {
            "method": f"{len(training_set.testing)} examples held out",
            "fine_tune": {
                "epochs": outcome.measured.epochs,
                "refit_epochs": outcome.refit_epochs,
                "mix": outcome.measured.mix,
                "frozen": asdict(outcome.measured.first),
                "tuned": asdict(outcome.measured.final),
            },
            "export": check_parity(model, head, backbone, training_set),
        }
        return TunedVersion(head, spec, (folder / GRAPH_FILE).read_bytes(), report, scores)


def weights_sha256(model: Model) -> str:
    """SHA-256, in hex, of the network's tensors by name; the fingerprint is made of it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.network.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _measured(
    model: Model,
    backbone: Backbone,
    training_set: TrainingSet,
    names: tuple[str, ...],
    config: ProbeConfig,
    logits: Floats | None,
) -> tuple[Head, dict[str, Any], Floats]:
    """Fit temperature, abstention and report on the held-out rows, and the region on all, as served.

    `logits`: (held out, labels), of the held-out rows by the network that was measured; None if that is this
    one. The region is hardly tighter for having learned from these rows: 0.9 % of emoji's test set lay
    outside it, as many as outside the region of the measured network.
    """
    rows = np.concatenate(
        [
            backbone.run(_unpadded(training_set.samples.plain(some)))
            for some in batches(range(len(training_set.labels)), _AT_ONCE)
        ]
    )
    if logits is None:
        with torch.inference_mode():
            logits = model.head(torch.from_numpy(rows[training_set.testing])).numpy()
    held = np.where(training_set.held_out, 0, -1).astype(np.int64)
    own = training_set.labels[training_set.testing]
    temperature, _ = temperatures.temperature(logits, own)
    logits = logits / np.float32(temperature)
    smoothing = measures.smoothing(len(own))
    probabilities = smoothed(softmax(logits), smoothing, len(names))
    costs = costs_of(config.costs, names)
    judged = judge(probabilities, own, costs, config.answer_accuracy)
    layer = model.head
    head = Head(
        task="classification",
        fingerprint=backbone.spec.fingerprint,
        labels=names,
        scaling=Scaling(layer.transform, layer.mean.numpy().copy(), float(layer.scale)),
        weight=storable(layer.weight.detach().numpy() / np.float32(temperature)),
        bias=layer.bias.detach().numpy() / np.float32(temperature),
        doubt=fit_abstention(judged.threshold, logits, "classification"),
        region=fit_region(rows, training_set.labels, held, directions_for(len(names), rows.shape[1])),
        costs=costs,
        alarms=judged.alarms,
        smoothing=smoothing,
    )
    sizes = np.bincount(training_set.labels, minlength=len(names))
    held_out = CrossValidated(probabilities, np.array(training_set.testing), own, judged)
    report = report_of(held_out, sizes, names)
    scores = np.full(len(training_set.labels), np.nan, np.float32)
    scores[training_set.testing] = judged.likeliest_right
    return head, report | {"temperature": temperature, "threshold": judged.threshold}, scores


def check_parity(model: Model, head: Head, backbone: Backbone, training_set: TrainingSet) -> dict[str, float]:
    """Compare logits of ONNX Runtime and torch on 512 probes: held-out, training, then augmented examples.

    Returns the number of probes and the largest difference. Raises ExportRefused.
    """
    model.eval()
    largest, count = 0.0, 0
    for tensors in _probes(training_set):
        with torch.inference_mode():
            theirs = head.logits(model.embed(*tensors).numpy())
        ours = head.logits(backbone.run(_unpadded(tensors)))
        largest, count = max(largest, float(np.abs(ours - theirs).max())), count + len(ours)
        if not largest <= _LARGEST_DIFFERENCE or (_answers(head, ours) != _answers(head, theirs)).any():
            raise ExportRefused(
                f"The exported network's logits differ from torch's by {largest:.2g} on {count} "
                "inputs; at most "
                f"{_LARGEST_DIFFERENCE} is accepted, and the same answers. Nothing was published."
            )
    return {"probes": count, "largest_difference": largest}


def _answers(head: Head, logits: Floats) -> Integers:
    return answers_of(softmax(logits), head.costs)


def _probes(training_set: TrainingSet) -> Iterator[Tensors]:
    rows = [*training_set.testing, *training_set.training]
    for some in batches(rows[:_PROBES], _AT_ONCE):
        yield training_set.samples.plain(some)
    seeded(0)
    for begin in range(len(rows), _PROBES, _AT_ONCE):
        some = [rows[(begin + place) % len(rows)] for place in range(min(_AT_ONCE, _PROBES - begin))]
        yield training_set.samples.augmented(some, 0)


def _unpadded(tensors: Tensors) -> Sequence[Prepared]:
    """A batch as unpadded inputs, which Backbone.run takes."""
    if len(tensors) == 1:
        return list(tensors[0].numpy())
    ids, mask = tensors
    return [row[:length].numpy() for row, length in zip(ids, mask.sum(dim=1).tolist(), strict=True)]
