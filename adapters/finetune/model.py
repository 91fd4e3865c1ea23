"""A trainable backbone with its head, the training set, and scores. Requires torch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from adapters.finetune.data import Samples, Tensors, batches
from adapters.heads.head import Head
from adapters.probe.calibration import temperatures
from models.arrays import Bools, Floats, Integers
from models.preprocess.pixels import scale_and_shift
from models.spec import ImageTransform, TextTransform

State = dict[str, torch.Tensor]

_EVALUATED_AT_ONCE = 16  # batch size of evaluation
# The square root has an infinite slope at zero: activations x are trained with the slope of sqrt(x + 0.1²).
_SMALLEST_ROOT = 0.1


class HeadLayer(torch.nn.Module):  # type: ignore[misc]
    """A head's logits for embeddings (n, dim): exactly those of Head.logits, but trainable."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.transform = head.scaling.transform
        self.register_buffer("mean", torch.from_numpy(head.scaling.mean.copy()))
        self.register_buffer("scale", torch.tensor(head.scaling.scale, dtype=torch.float32))
        # The temperature becomes part of the weights; a new one is measured at the end.
        slope = np.float32(1.0 / head.temperature)
        self.weight = torch.nn.Parameter(torch.from_numpy(head.weight * slope))
        self.bias = torch.nn.Parameter(torch.from_numpy(head.bias * slope))

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Logits, float32 (n, labels)."""
        # The head computes in single precision, as in serving, whatever the precision of the network.
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.float()
            if self.transform == "sqrt":
                embeddings = _root(embeddings)
            return torch.nn.functional.linear((embeddings - self.mean) / self.scale, self.weight, self.bias)


def _root(activations: torch.Tensor) -> torch.Tensor:
    """Square roots with a bounded slope at zero."""
    positive = activations.clamp_min(0.0)
    smooth = torch.sqrt(positive + _SMALLEST_ROOT**2)
    return smooth + (torch.sqrt(positive) - smooth).detach()


class Model(torch.nn.Module):  # type: ignore[misc]
    """A backbone's network followed by a head."""

    def __init__(self, network: Any, head: Head, transform: ImageTransform | TextTransform) -> None:
        super().__init__()
        # Convolutions in this format train 1.5 times as fast on a CPU (EfficientNet-Lite0, one thread).
        self.network = network.to(memory_format=torch.channels_last)
        self.head = HeadLayer(head)
        # These are not buffers, because checkpoints of earlier releases do not have them.
        self._scale, self._shift = torch.ones(()), torch.zeros(())
        if isinstance(transform, ImageTransform):
            self._scale, self._shift = map(torch.from_numpy, scale_and_shift(transform))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Logits, float32 (n, labels), of a batch on the model's device."""
        return self.head(self.embed(*inputs))

    def embed(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The network's embeddings (n, dim) of a batch on the model's device."""
        if inputs[0].dtype == torch.uint8:
            scale, shift = (one.to(self.device) for one in (self._scale, self._shift))
            return self.network(inputs[0].permute(0, 3, 1, 2).float() * scale - shift)
        return self.network(*inputs)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.head.weight.device


def freeze(network: Any) -> None:
    """Freeze all weights and statistics: phase 1 leaves the network unchanged, bit for bit."""
    network.requires_grad_(False)
    network.eval()


def unfreeze(network: Any) -> None:
    """Make all weights trainable; normalisation keeps its original statistics.

    Statistics of a tenant's few batches would undo what the network knows (the Keras guide's warning). Call
    this again after anything that calls train().
    """
    network.requires_grad_(True)
    network.train()
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """Samples with their labels, some of which are held out."""

    samples: Samples
    labels: Integers  # (n,)
    held_out: Bools  # (n,)
    # Embeddings of all rows by the original network, float32 (n, dim); phase 1 computes them if None.
    embeddings: Floats | None = None
    sampled: Bools | None = None  # (n,), the held-out rows to measure on; None for all

    @property
    def training(self) -> list[int]:
        """Rows to train on."""
        return [int(row) for row in np.flatnonzero(~self.held_out)]

    @property
    def whole(self) -> TrainingSet:
        """The same set with nothing held out."""
        return replace(self, held_out=np.zeros_like(self.held_out))

    @property
    def testing(self) -> list[int]:
        """Held-out rows to measure on."""
        measured = self.held_out if self.sampled is None else self.held_out & self.sampled
        return [int(row) for row in np.flatnonzero(measured)]


@dataclass(frozen=True, slots=True)
class Score:
    """Mean cross-entropy in nats, at the best temperature, and accuracy on the held-out rows."""

    loss: float
    accuracy: float


def embed(model: Model, samples: Samples, rows: Sequence[int]) -> torch.Tensor:
    """Embeddings, float32 (n, dim), as serving would compute them."""
    model.eval()
    with torch.inference_mode():
        parts = [
            model.embed(*on_device(model, samples.plain(some))).float()
            for some in batches(rows, _EVALUATED_AT_ONCE)
        ]
    return torch.cat(parts)


def evaluate(model: Model, training_set: TrainingSet) -> Score:
    """Loss and accuracy on the held-out rows."""
    return score_of(model, training_set, embed(model, training_set.samples, training_set.testing))


def score_of(model: Model, training_set: TrainingSet, embeddings: torch.Tensor) -> Score:
    """Loss and accuracy on the held-out rows, given their embeddings (held out, dim)."""
    with torch.inference_mode():
        logits = model.head(embeddings.to(model.device)).cpu().numpy()
    labels = training_set.labels[training_set.testing]
    # The loss is taken at the best temperature, as one is fitted at the end: otherwise the confidence that
    # grows with training would hide what is learned.
    _, loss = temperatures.temperature(logits, labels)
    return Score(loss, float((logits.argmax(axis=1) == labels).mean()))


def class_weights(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Class weights (count,) that correct half of the imbalance: the square root of balanced ones."""
    sizes = torch.bincount(labels, minlength=count).clamp_min(1).float()
    weights = (sizes.sum() / (len(sizes) * sizes)).sqrt()
    return weights * (sizes.sum() / (weights * sizes).sum())


def state_of(model: Model) -> State:
    """A copy of the model's state."""
    return copy.deepcopy(model.state_dict())


def on_device(model: Model, inputs: Tensors) -> Tensors:
    """The inputs on the model's device."""
    return tuple(one.to(model.device) for one in inputs)
