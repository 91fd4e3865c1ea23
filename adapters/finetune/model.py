"""A backbone with a head behind it, as it is trained, and what it is trained on. Torch lives here."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapters.finetune.data import Samples, Tensors, batches
from adapters.heads.head import Head
from adapters.probe import calibration
from models.arrays import Floats
from models.preprocess.pixels import scale_and_shift
from models.spec import ImageTransform, TextTransform

State = dict[str, torch.Tensor]

_EVALUATED_AT_ONCE = 16
# The square root of an activation has no slope at zero: from here on down it is trained with this one's.
_SMALLEST_ROOT = 0.1


class HeadLayer(torch.nn.Module):  # type: ignore[misc]
    """A head's logits, of embeddings (n, dim): exactly what Head.predict computes, and trainable."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.transform = head.scaling.transform
        self.register_buffer("mean", torch.from_numpy(head.scaling.mean.copy()))
        self.register_buffer("scale", torch.tensor(head.scaling.scale, dtype=torch.float32))
        # The temperature is part of the weights from here on; another one is measured at the end.
        slope = np.float32(1.0 / head.temperature)
        self.weight = torch.nn.Parameter(torch.from_numpy(head.weight * slope))
        self.bias = torch.nn.Parameter(torch.from_numpy(head.bias * slope))

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Logits, float32 (n, labels)."""
        # In single precision whatever the network computes in, as Head.predict does.
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.float()
            if self.transform == "sqrt":
                embeddings = _root(embeddings)
            return torch.nn.functional.linear((embeddings - self.mean) / self.scale, self.weight, self.bias)


def _root(activations: torch.Tensor) -> torch.Tensor:
    """Square roots, whose slope is bounded where the activations vanish."""
    positive = activations.clamp_min(0.0)
    smooth = torch.sqrt(positive + _SMALLEST_ROOT**2)
    return smooth + (torch.sqrt(positive) - smooth).detach()


class Model(torch.nn.Module):  # type: ignore[misc]
    """A backbone's network with a head behind it."""

    def __init__(self, network: Any, head: Head, transform: ImageTransform | TextTransform) -> None:
        super().__init__()
        # Convolutions on a CPU train 1.5 times as fast so (EfficientNet-Lite0, one thread).
        self.network = network.to(memory_format=torch.channels_last)
        self.head = HeadLayer(head)
        # No part of the state: a checkpoint of an earlier release has none.
        self._scale, self._shift = torch.ones(()), torch.zeros(())
        if isinstance(transform, ImageTransform):
            self._scale, self._shift = map(torch.from_numpy, scale_and_shift(transform))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Logits, float32 (n, labels), of a batch where the weights are."""
        return self.head(self.embed(*inputs))

    def embed(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The network's embeddings (n, dim) of a batch where the weights are."""
        if inputs[0].dtype == torch.uint8:
            scale, shift = (one.to(self.device) for one in (self._scale, self._shift))
            return self.network(inputs[0].permute(0, 3, 1, 2).float() * scale - shift)
        return self.network(*inputs)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.head.weight.device


def freeze(network: Any) -> None:
    """No weight learns and no statistic moves: phase 1 leaves the network as it is, bit for bit."""
    network.requires_grad_(False)
    network.eval()


def unfreeze(network: Any) -> None:
    """Every weight learns; normalisation keeps the statistics that it came with.

    Statistics of a tenant's few batches would undo what the network knows (the Keras guide's warning). To be
    called again after whatever calls train().
    """
    network.requires_grad_(True)
    network.train()
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """What is learned from: rows of samples, their labels (n,), and which of them are held out (n,).

    embeddings: of all rows by the network as it came, float32 (n, dim), where they are known; else the first
    phase computes them. sampled: bool (n,), which of those held out are measured on; all by default.
    """

    samples: Samples
    labels: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    embeddings: Floats | None = None
    sampled: NDArray[np.bool_] | None = None

    @property
    def training(self) -> list[int]:
        """Rows to train on."""
        return [int(row) for row in np.flatnonzero(~self.held_out)]

    @property
    def whole(self) -> TrainingSet:
        """The same with nothing held out."""
        return replace(self, held_out=np.zeros_like(self.held_out))

    @property
    def testing(self) -> list[int]:
        """Rows to measure on."""
        measured = self.held_out if self.sampled is None else self.held_out & self.sampled
        return [int(row) for row in np.flatnonzero(measured)]


@dataclass(frozen=True, slots=True)
class Score:
    """Mean cross-entropy in nats, at the best temperature, and accuracy on the rows held out."""

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


def evaluate(model: Model, lesson: TrainingSet) -> Score:
    """Loss and accuracy on the rows held out."""
    return score_of(model, lesson, embed(model, lesson.samples, lesson.testing))


def score_of(model: Model, lesson: TrainingSet, embeddings: torch.Tensor) -> Score:
    """The same, of the embeddings (held out, dim) of these rows."""
    with torch.inference_mode():
        logits = model.head(embeddings.to(model.device)).cpu().numpy()
    labels = lesson.labels[lesson.testing]
    # At the best temperature, for one is measured at the end: else the sureness that grows with training
    # would hide what is learned.
    _, loss = calibration.temperature(logits, labels)
    return Score(loss, float((logits.argmax(axis=1) == labels).mean()))


def class_weights(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Weights (count,) that make up for half of the imbalance: the square root of balanced ones."""
    sizes = torch.bincount(labels, minlength=count).clamp_min(1).float()
    weights = (sizes.sum() / (len(sizes) * sizes)).sqrt()
    return weights * (sizes.sum() / (weights * sizes).sum())


def state_of(model: Model) -> State:
    """A copy of everything that the model holds."""
    return copy.deepcopy(model.state_dict())


def on_device(model: Model, inputs: Tensors) -> Tensors:
    """The inputs where the model's weights are."""
    return tuple(one.to(model.device) for one in inputs)
