"""The second phase of a fine-tune: everything learns, gently. Torch lives here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adapters.finetune.data import batches, seeded
from adapters.finetune.model import (
    Model,
    Score,
    State,
    TrainingSet,
    class_weights,
    evaluate,
    on_device,
    state_of,
    unfreeze,
)

_WEIGHT_DECAY = 0.01
_WARM_UP = 0.1
_LARGEST_GRADIENT = 1.0
# What one optimizer steps over: about a millisecond on a CPU.
_WEIGHTS_A_STEP = 1_000_000
# Of the whole work, what is done when a refit begins: it trains on a quarter more rows.
_SHARE_MEASURED = 0.45


class Diverged(RuntimeError):
    """The loss is no number any more. Nothing was published."""

    code = "diverged"


@dataclass(frozen=True, slots=True)
class FineTuneConfig:
    """How to fine-tune.

    epochs: of everything, at most. full_size_epochs: how many of them, the last, see images at the backbone's
    own size; the others at `pixels`, which costs a third. head_rate, backbone_rate: learning rates of the
    second phase. patience: epochs of its second half without a better held-out loss before it stops.
    refit: whether all is trained once more, on the rows held out too, in the way that was found best.
    """

    epochs: int = 8
    full_size_epochs: int = 7
    pixels: int = 128
    batch: int = 16
    head_rate: float = 1e-3
    backbone_rate: float = 1e-4
    patience: int = 3
    refit: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """An epoch's end. phase: 1, 2, or 3 for an epoch of the refit; epochs: that the phase may have.

    share: of the whole work, 0..1. training_loss: None in phase 1. held_out: None after an epoch with images
    smaller than those served, and in the refit, which nothing is held out of.
    """

    phase: int
    epoch: int
    epochs: int
    training_loss: float | None
    held_out: Score | None
    share: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found on the rows held out, and how.

    first, final: scores of phase 1 and of the mix. mix: how far that is from phase 1 (0) to the best epoch of
    phase 2 (1). epochs: trained; best_epoch: the one that was mixed, 0 for none.
    """

    first: Score
    final: Score
    mix: float
    epochs: int
    best_epoch: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All that a second phase needs to go on after an epoch: names to tensors, and the numbers beside them.

    Loads into the same network with the same lesson and config. measured: of a refit, what it repeats; then
    the tensors of the best epoch are those of the network that was measured.
    """

    tensors: Mapping[str, torch.Tensor]
    epoch: int
    stale: int
    best_epoch: int
    best: Score
    first: Score
    measured: Measured | None = None


class FullNetworkPhase:
    """Training epoch by epoch, from the start or from where another attempt was.

    refit: what was measured and the network that it was measured on. Then as many epochs as were best are
    trained, the rates falling within them, and none is measured.
    """

    def __init__(
        self,
        model: Model,
        lesson: TrainingSet,
        config: FineTuneConfig,
        first: Score,
        resume: Checkpoint | None = None,
        refit: tuple[Measured, State] | None = None,
    ) -> None:
        self._model, self._lesson, self._config = model, lesson, config
        self.first = self._best = first
        self._measured = None if refit is None else refit[0]
        # The rates fall to nothing in so many epochs: the best of more would be one in mid-fall.
        self._last = config.epochs if refit is None else refit[0].best_epoch
        self._weights = class_weights(torch.from_numpy(lesson.labels[lesson.training]), len(model.head.bias))
        self.start = state_of(model)
        self.best_state = self.start if refit is None else refit[1]
        self.epoch = self.best_epoch = self._stale = 0
        unfreeze(model.network)
        # What the first phase left of gradients is of other weights, and so is what its optimizer gathered.
        model.zero_grad()
        self._optimizers = [torch.optim.AdamW(groups, fused=True) for groups in _parts(model, config)]
        self._steps_per_epoch = -(-len(lesson.training) // config.batch)
        if resume is not None:
            self._load(resume)

    def epochs(self) -> Iterator[tuple[Progress, Checkpoint]]:
        """Trains until the last epoch, or until the held-out loss has not fallen for long in the second half.

        Only epochs at the backbone's own size are measured: after others, which prepare for these, it looks
        worse at that size than where it began.
        """
        while self.epoch < self._last and self._stale < self._config.patience:
            size = self._size
            loss = self._train_once(size)
            self.epoch += 1
            score = evaluate(self._model, self._lesson) if size == 0 and self._measured is None else None
            if score is not None and score.loss < self._best.loss:
                self._best, self.best_state, self.best_epoch = score, state_of(self._model), self.epoch
                self._stale = 0
            elif score is not None and 2 * self.epoch > self._config.epochs:
                # Before, the rate is still high: a network that looks worse then gets better as it falls.
                self._stale += 1
            phase = 2 if self._measured is None else 3
            yield Progress(phase, self.epoch, self._last, loss, score, self._share()), self._checkpoint()

    def _share(self) -> float:
        """Of the whole work, as far as it is known by now."""
        begin = 0.1 if self._measured is None else _SHARE_MEASURED
        end = _SHARE_MEASURED if self._measured is None and self._config.refit else 1.0
        return begin + (end - begin) * self.epoch / self._last

    @property
    def _size(self) -> int:
        """Pixels of the next epoch's images; 0 for the backbone's own size, and for texts."""
        small = self.epoch < self._config.epochs - self._config.full_size_epochs
        return self._config.pixels if small and self._lesson.samples.size else 0

    def _train_once(self, size: int) -> float:
        config, model = self._config, self._model
        order = seeded(config.seed, self.epoch, self._measured is not None)
        total, count = 0.0, 0
        unfreeze(model.network)
        model.head.train()
        for step, rows in enumerate(batches(self._lesson.training, config.batch, order)):
            loss = self._accumulate(rows, size)
            if not math.isfinite(loss):
                raise Diverged(f"The loss became {loss} in epoch {self.epoch + 1}.")
            self._step(self._rate_at(self.epoch * self._steps_per_epoch + step))
            total, count = total + loss * len(rows), count + len(rows)
        return total / count

    def _step(self, share: float) -> None:
        """Along the gradients, which are clipped and then gone. share: of the full rates.

        In parts, between which others may have the core.
        """
        # What is not on the way to an embedding, as BERT's own pooling, has none.
        gradients = [one.grad for one in self._model.parameters() if one.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * share
                torch.nn.utils.clip_grads_with_norm_(group["params"], _LARGEST_GRADIENT, norm)
            optimizer.step()
            optimizer.zero_grad()

    def _accumulate(self, rows: list[int], size: int) -> float:
        """Adds the gradients of a batch's mean loss, and returns that loss.

        A few rows at a time, for no row's loss depends on another's: normalisation keeps its statistics.
        """
        model = self._model
        weights = self._weights[self._lesson.labels[rows]]
        whole, loss = weights.sum().item(), 0.0
        samples = self._lesson.samples
        for some in samples.pieces(rows, size) if model.device.type == "cpu" else [rows]:
            inputs = on_device(model, samples.augmented(some, size))
            labels = torch.from_numpy(self._lesson.labels[some]).to(model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
                logits = model(*inputs)
            part = torch.nn.functional.cross_entropy(
                logits.float(), labels, weight=self._weights.to(model.device), reduction="sum"
            )
            part = part / whole
            part.backward()
            loss += part.item()
        return loss

    def _rate_at(self, step: int) -> float:
        """Up to the full rate in the first tenth, then down a half cosine to nothing."""
        steps = self._steps_per_epoch * self._last
        done = step / steps
        if done < _WARM_UP:
            return (step + 1) / (_WARM_UP * steps + 1)
        return 0.5 * (1.0 + math.cos(math.pi * (done - _WARM_UP) / (1.0 - _WARM_UP)))

    def _checkpoint(self) -> Checkpoint:
        tensors = {f"start.{name}": value for name, value in self.start.items()}
        tensors |= {f"best.{name}": value for name, value in self.best_state.items()}
        tensors |= {f"last.{name}": value for name, value in state_of(self._model).items()}
        for part, optimizer in enumerate(self._optimizers):
            for place, kept in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{part}.{place}.{name}": one.clone() for name, one in kept.items()}
        return Checkpoint(
            tensors, self.epoch, self._stale, self.best_epoch, self._best, self.first, self._measured
        )

    def _load(self, resume: Checkpoint) -> None:
        def part(prefix: str) -> State:
            return {
                name.removeprefix(prefix): value.to(self._model.device)
                for name, value in resume.tensors.items()
                if name.startswith(prefix)
            }

        self.start, self.best_state = part("start."), part("best.")
        self._model.load_state_dict(part("last."))
        for number, optimizer in enumerate(self._optimizers):
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            kept: dict[int, State] = {}
            for key, value in part(f"optimizer.{number}.").items():
                place, name = key.split(".")
                if value.ndim:
                    # As its parameter lies in memory, which the fused optimizer takes for granted.
                    value = torch.empty_like(parameters[int(place)]).copy_(value)
                kept.setdefault(int(place), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": kept})
        self.epoch, self._stale, self._best = resume.epoch, resume.stale, resume.best
        self.best_epoch = resume.best_epoch


def _parts(model: Model, config: FineTuneConfig) -> list[list[dict[str, Any]]]:
    """Groups of parameters for each optimizer: the head's at its rate, the network's at its smaller one.

    Decay is for matrices alone.
    """
    parts: list[dict[tuple[float, float], list[Any]]] = []
    room = 0
    for module, rate in ((model.head, config.head_rate), (model.network, config.backbone_rate)):
        for one in module.parameters():
            if room < one.numel():
                parts.append({})
                room = _WEIGHTS_A_STEP
            room -= one.numel()
            parts[-1].setdefault((rate, _WEIGHT_DECAY if one.ndim > 1 else 0.0), []).append(one)
    return [
        [
            {"params": some, "lr": rate, "full_rate": rate, "weight_decay": decay}
            for (rate, decay), some in part.items()
        ]
        for part in parts
    ]
