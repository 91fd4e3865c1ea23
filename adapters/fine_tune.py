"""Fine-tunes a backbone for one adapter: its head first, with everything else frozen, then all of it gently.

The order of steps is that of the Keras guide to transfer learning (https://keras.io/guides/transfer_learning):
train a new head to convergence on the frozen network, then unfreeze and train everything with a learning rate
ten to a hundred times smaller, normalisation layers still in inference mode. docs/fine-tuning.md gives the
source of every choice. Torch lives here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapters import calibration
from adapters.head import Head
from adapters.samples import Samples, Tensors, batches, seeded

State = dict[str, torch.Tensor]
Floats = NDArray[np.float32]

_WEIGHT_DECAY = 0.01
_WARM_UP = 0.1
_LARGEST_GRADIENT = 1.0
# Between the network as it came and the best one that was trained (WiSE-FT, Wortsman et al. 2022).
_MIXES = (0.25, 0.5, 0.75, 1.0)
_EVALUATED_AT_ONCE = 16
# The square root of an activation has no slope at zero: from here on down it is trained with this one's.
_SMALLEST_ROOT = 0.1


class Diverged(RuntimeError):
    """The loss is no number any more. Nothing was published."""

    code = "diverged"


@dataclass(frozen=True, slots=True)
class FineTuneConfig:
    """How to fine-tune.

    epochs: of everything, at most. full_size_epochs: how many of them, the last, see images at the backbone's
    own size; the others at `pixels`, which costs a third. head_rate, backbone_rate: learning rates of the
    second phase. patience: epochs without a better held-out loss before it stops.
    """

    epochs: int = 8
    full_size_epochs: int = 2
    pixels: int = 128
    batch: int = 32
    head_rate: float = 1e-3
    backbone_rate: float = 1e-4
    patience: int = 3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is learned from: rows of samples, their labels (n,), and which of them are held out (n,)."""

    samples: Samples
    labels: NDArray[np.int64]
    held_out: NDArray[np.bool_]

    @property
    def training(self) -> list[int]:
        """Rows to train on."""
        return [int(row) for row in np.flatnonzero(~self.held_out)]

    @property
    def testing(self) -> list[int]:
        """Rows to measure on."""
        return [int(row) for row in np.flatnonzero(self.held_out)]


@dataclass(frozen=True, slots=True)
class Score:
    """Mean cross-entropy in nats, at the best temperature, and accuracy on the rows held out."""

    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Progress:
    """An epoch's end. phase: 1 or 2; training_loss: None in phase 1; share: of the whole work, 0..1."""

    phase: int
    epoch: int
    training_loss: float | None
    held_out: Score
    share: float


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All that a second phase needs to go on after an epoch: names to tensors, and the numbers beside them.

    Loads into the same network with the same lesson and config.
    """

    tensors: Mapping[str, torch.Tensor]
    epoch: int
    stale: int
    best: Score
    first: Score


@dataclass(frozen=True, slots=True)
class FineTuned:
    """What came out; the model holds it. mix: how far from phase 1 (0) to the best of phase 2 (1)."""

    first: Score
    final: Score
    mix: float
    epochs: int


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

    def __init__(self, network: Any, head: Head) -> None:
        super().__init__()
        self.network = network
        self.head = HeadLayer(head)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Logits, float32 (n, labels)."""
        return self.head(self.network(*inputs))

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


def embed(model: Model, samples: Samples, rows: Sequence[int]) -> torch.Tensor:
    """Embeddings, float32 (n, dim), as serving would compute them."""
    model.eval()
    with torch.inference_mode():
        parts = [
            model.network(*_on(model, samples.plain(some))).float()
            for some in batches(rows, _EVALUATED_AT_ONCE)
        ]
    return torch.cat(parts)


def train_head(model: Model, embeddings: torch.Tensor, labels: torch.Tensor, strength: float) -> None:
    """Phase 1: the head to convergence by L-BFGS, the network frozen.

    embeddings: of the frozen network, computed once: it would give the same in every epoch. strength: of the
    pull to where the head begins, the linear probe, which chose it on examples held out.
    """
    freeze(model.network)
    head = model.head
    features = embeddings.to(model.device).clone()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    weights = class_weights(labels, len(head.bias)).to(model.device)
    penalty = strength / (2.0 * len(labels))
    start = head.weight.detach().clone()
    labels = labels.to(model.device)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(head(features), labels, weight=weights)
        loss = loss + penalty * (head.weight - start).square().sum()
        if not math.isfinite(loss.item()):
            raise Diverged("The loss of the first phase is not a number; look at the examples.")
        loss.backward()
        return loss

    optimizer.step(closure)


def class_weights(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Weights (count,) that make up for half of the imbalance: the square root of balanced ones."""
    sizes = torch.bincount(labels, minlength=count).clamp_min(1).float()
    weights = (sizes.sum() / (len(sizes) * sizes)).sqrt()
    return weights * (sizes.sum() / (weights * sizes).sum())


def fine_tune(
    model: Model,
    lesson: Lesson,
    strength: float,
    config: FineTuneConfig = FineTuneConfig(),
    *,
    resume: Checkpoint | None = None,
    tell: Callable[[Progress, Checkpoint | None], None] = lambda progress, checkpoint: None,
) -> FineTuned:
    """Both phases, the mix of their results, and what it scores. The model is left as the best found.

    model: begins with the head of a linear probe on the training rows, and strength is that probe's. tell is
    called after each epoch and may raise to end it. Raises Diverged.
    """
    if resume is None:
        embeddings = embed(model, lesson.samples, lesson.training)
        train_head(model, embeddings, torch.from_numpy(lesson.labels[lesson.training]), strength)
        first = evaluate(model, lesson)
        tell(Progress(1, 0, None, first, 0.1), None)
    else:
        first = resume.first
    training = _Training(model, lesson, config, first, resume)
    for progress, checkpoint in training.epochs():
        tell(progress, checkpoint)
    mix, final = _mixed(model, lesson, training.start, training.best_state, first)
    return FineTuned(first, final, mix, training.epoch)


def evaluate(model: Model, lesson: Lesson) -> Score:
    """Loss and accuracy on the rows held out."""
    embeddings = embed(model, lesson.samples, lesson.testing)
    with torch.inference_mode():
        logits = model.head(embeddings).cpu().numpy()
    labels = lesson.labels[lesson.testing]
    # At the best temperature, for one is measured at the end: else the sureness that grows with training
    # would hide what is learned.
    _, loss = calibration.temperature(logits, labels)
    return Score(loss, float((logits.argmax(axis=1) == labels).mean()))


class _Training:
    """Phase 2, epoch by epoch."""

    def __init__(
        self, model: Model, lesson: Lesson, config: FineTuneConfig, first: Score, resume: Checkpoint | None
    ) -> None:
        self._model, self._lesson, self._config = model, lesson, config
        self._first = self._best = first
        self._weights = class_weights(torch.from_numpy(lesson.labels[lesson.training]), len(model.head.bias))
        self.start = _state(model)
        self.best_state = self.start
        self.epoch = self._stale = 0
        unfreeze(model.network)
        # Built anew: what the first phase gathered is of other weights.
        self._optimizer = torch.optim.AdamW(_groups(model, config))
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._steps_per_epoch = -(-len(lesson.training) // config.batch)
        if resume is not None:
            self._load(resume)

    def epochs(self) -> Iterator[tuple[Progress, Checkpoint]]:
        """Trains until the last epoch, or until the held-out loss has not fallen for long."""
        while self.epoch < self._config.epochs and self._stale < self._config.patience:
            loss = self._train_once()
            self.epoch += 1
            score = evaluate(self._model, self._lesson)
            if score.loss < self._best.loss:
                self._best, self.best_state, self._stale = score, _state(self._model), 0
            else:
                self._stale += 1
            share = 0.1 + 0.9 * self.epoch / self._config.epochs
            yield Progress(2, self.epoch, loss, score, share), self._checkpoint()

    def _train_once(self) -> float:
        config, model = self._config, self._model
        order = seeded(config.seed, self.epoch)
        small = self.epoch < config.epochs - config.full_size_epochs
        total, count = 0.0, 0
        unfreeze(model.network)
        model.head.train()
        for step, rows in enumerate(batches(self._lesson.training, config.batch, order)):
            share = self._rate_at(self.epoch * self._steps_per_epoch + step)
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * share
            inputs = self._lesson.samples.augmented(rows, config.pixels if small else 0)
            labels = torch.from_numpy(self._lesson.labels[rows]).to(model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
                logits = model(*_on(model, inputs))
            loss = torch.nn.functional.cross_entropy(
                logits.float(), labels, weight=self._weights.to(model.device)
            )
            if not math.isfinite(loss.item()):
                raise Diverged(f"The loss became {loss.item()} in epoch {self.epoch + 1}.")
            self._optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _LARGEST_GRADIENT)
            self._optimizer.step()
            total, count = total + loss.item() * len(rows), count + len(rows)
        return total / count

    def _rate_at(self, step: int) -> float:
        """Up to the full rate in the first tenth, then down a half cosine to nothing."""
        steps = self._steps_per_epoch * self._config.epochs
        done = step / steps
        if done < _WARM_UP:
            return (step + 1) / (_WARM_UP * steps + 1)
        return 0.5 * (1.0 + math.cos(math.pi * (done - _WARM_UP) / (1.0 - _WARM_UP)))

    def _checkpoint(self) -> Checkpoint:
        tensors = {f"start.{name}": value for name, value in self.start.items()}
        tensors |= {f"best.{name}": value for name, value in self.best_state.items()}
        tensors |= {f"last.{name}": value for name, value in _state(self._model).items()}
        for place, kept in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{place}.{name}": value.clone() for name, value in kept.items()}
        return Checkpoint(tensors, self.epoch, self._stale, self._best, self._first)

    def _load(self, resume: Checkpoint) -> None:
        def part(prefix: str) -> State:
            return {
                name.removeprefix(prefix): value
                for name, value in resume.tensors.items()
                if name.startswith(prefix)
            }

        self.start, self.best_state = part("start."), part("best.")
        self._model.load_state_dict(part("last."))
        kept: dict[int, State] = {}
        for key, value in part("optimizer.").items():
            place, name = key.split(".")
            kept.setdefault(int(place), {})[name] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": kept})
        self.epoch, self._stale, self._best = resume.epoch, resume.stale, resume.best


def _groups(model: Model, config: FineTuneConfig) -> list[dict[str, Any]]:
    """The head at its rate, the network at its smaller one; decay only for matrices."""

    def split(module: Any, rate: float) -> list[dict[str, Any]]:
        matrices = [one for one in module.parameters() if one.ndim > 1]
        vectors = [one for one in module.parameters() if one.ndim <= 1]
        return [
            {"params": matrices, "lr": rate, "weight_decay": _WEIGHT_DECAY},
            {"params": vectors, "lr": rate, "weight_decay": 0.0},
        ]

    return split(model.head, config.head_rate) + split(model.network, config.backbone_rate)


def _mixed(model: Model, lesson: Lesson, start: State, best: State, first: Score) -> tuple[float, Score]:
    """Leaves the model at the mix of both phases with the lowest loss; how far it is from the first."""
    found, found_mix = first, 0.0
    for mix in _MIXES if best is not start else ():
        model.load_state_dict(_between(start, best, mix))
        score = evaluate(model, lesson)
        if score.loss < found.loss:
            found, found_mix = score, mix
    model.load_state_dict(_between(start, best, found_mix))
    freeze(model)
    return found_mix, found


def _between(start: State, end: State, mix: float) -> State:
    return {
        name: torch.lerp(value, end[name], mix) if value.is_floating_point() else value
        for name, value in start.items()
    }


def _state(model: Model) -> State:
    return copy.deepcopy(model.state_dict())


def _on(model: Model, inputs: Tensors) -> Tensors:
    return tuple(one.to(model.device) for one in inputs)
