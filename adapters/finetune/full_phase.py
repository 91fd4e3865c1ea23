"""Phase 2 of a fine-tune: training of the whole network at low rates, and the refit. Requires torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adapters.finetune.config import FineTuneConfig
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
from models.errors import DomainError

_WEIGHT_DECAY = 0.01
_WARM_UP = 0.1  # share of the steps in which the rate rises
_LARGEST_GRADIENT = 1.0  # norm to which gradients are clipped
_WEIGHTS_A_STEP = 1_000_000  # weights per optimizer; a step then takes about 1 ms on a CPU
_SHARE_MEASURED = 0.45  # share of the work done before the refit, which trains on a quarter more rows


class Diverged(DomainError):
    """The loss is not finite any more. Nothing was published."""

    code = "diverged"


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress at the end of an epoch."""

    phase: int  # 1, 2, or 3 for the refit
    epoch: int
    epochs: int  # most epochs in the phase
    training_loss: float | None  # None in phase 1
    # None after an epoch with images smaller than those served, and in the refit, which holds nothing out.
    held_out: Score | None
    share: float  # share of the whole work done, 0..1


@dataclass(frozen=True, slots=True)
class HeldOutResult:
    """Scores on the held-out rows, and how they were reached."""

    first: Score  # score of phase 1
    final: Score  # score of the mix
    mix: float  # position of the mix between phase 1 (0) and the best epoch of phase 2 (1)
    epochs: int  # number of epochs trained in phase 2
    best_epoch: int  # the one that was mixed; 0 for none


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that phase 2 needs to resume after an epoch: tensors by name, and numbers.

    It loads into the same network with the same training set and config.
    """

    tensors: Mapping[str, torch.Tensor]
    epoch: int  # number of epochs trained
    stale: int  # number of epochs in the second half since the held-out loss was last better
    best_epoch: int  # 0 for none
    best: Score  # score of that epoch, or of phase 1
    first: Score  # score of phase 1
    # A refit repeats this result. It then keeps the measured network as the tensors of the best epoch.
    measured: HeldOutResult | None = None


class FullNetworkPhase:
    """Trains epoch by epoch, from the start or from the checkpoint of another attempt.

    `refit`: the measured result, and the state of the network that it was measured on. The refit trains as
    many epochs as were best, with the learning rates falling to zero within them, and measures none.
    """

    def __init__(
        self,
        model: Model,
        training_set: TrainingSet,
        config: FineTuneConfig,
        first: Score,
        resume: Checkpoint | None = None,
        refit: tuple[HeldOutResult, State] | None = None,
    ) -> None:
        self._model, self._training_set, self._config = model, training_set, config
        self.first = self._best = first
        self._measured = None if refit is None else refit[0]
        # The rates fall to zero in this many epochs: the best of a longer schedule would be one in mid-fall.
        self._last = config.epochs if refit is None else refit[0].best_epoch
        self._weights = class_weights(
            torch.from_numpy(training_set.labels[training_set.training]), len(model.head.bias)
        )
        self.start = state_of(model)
        self.best_state = self.start if refit is None else refit[1]
        self.epoch = self.best_epoch = self._stale = 0
        unfreeze(model.network)
        # Phase 1's gradients and optimizer state belong to other weights, so both start clean.
        model.zero_grad()
        self._optimizers = [torch.optim.AdamW(groups, fused=True) for groups in _parts(model, config)]
        self._steps_per_epoch = -(-len(training_set.training) // config.batch)
        if resume is not None:
            self._load(resume)

    def epochs(self) -> Iterator[tuple[Progress, Checkpoint]]:
        """Train to the last epoch, or until the held-out loss stops falling in the second half.

        Only epochs at the backbone's own size are measured: after the smaller ones, which prepare for these,
        the network looks worse at that size than where it began.
        """
        while self.epoch < self._last and self._stale < self._config.patience:
            size = self._size
            loss = self._train_once(size)
            self.epoch += 1
            score = (
                evaluate(self._model, self._training_set) if size == 0 and self._measured is None else None
            )
            if score is not None and score.loss < self._best.loss:
                self._best, self.best_state, self.best_epoch = score, state_of(self._model), self.epoch
                self._stale = 0
            elif score is not None and 2 * self.epoch > self._config.epochs:
                # The rate is still high in the first half; a network that looks worse then improves.
                self._stale += 1
            phase = 2 if self._measured is None else 3
            yield Progress(phase, self.epoch, self._last, loss, score, self._share()), self._checkpoint()

    def _share(self) -> float:
        """Share of the whole work that is done, as an estimate."""
        begin = 0.1 if self._measured is None else _SHARE_MEASURED
        end = _SHARE_MEASURED if self._measured is None and self._config.refit else 1.0
        return begin + (end - begin) * self.epoch / self._last

    @property
    def _size(self) -> int:
        """Size of the next epoch's images in pixels; 0 for the backbone's own size, and for texts."""
        small = self.epoch < self._config.epochs - self._config.full_size_epochs
        return self._config.pixels if small and self._training_set.samples.size else 0

    def _train_once(self, size: int) -> float:
        config, model = self._config, self._model
        order = seeded(config.seed, self.epoch, self._measured is not None)
        total, count = 0.0, 0
        unfreeze(model.network)
        model.head.train()
        for step, rows in enumerate(batches(self._training_set.training, config.batch, order)):
            loss = self._accumulate(rows, size)
            if not math.isfinite(loss):
                raise Diverged(
                    f"The loss became {loss} in epoch {self.epoch + 1}. "
                    "Look for wrong labels and broken inputs."
                )
            self._step(self._rate_at(self.epoch * self._steps_per_epoch + step))
            total, count = total + loss * len(rows), count + len(rows)
        return total / count

    def _step(self, share: float) -> None:
        """Clip the gradients, take a step at this share of the full rates, and clear them.

        Each optimizer steps over its own part of the weights; in between, other work may have the core.
        """
        # Weights that do not contribute to an embedding, such as BERT's own pooling, have no gradient.
        gradients = [one.grad for one in self._model.parameters() if one.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * share
                torch.nn.utils.clip_grads_with_norm_(group["params"], _LARGEST_GRADIENT, norm)
            optimizer.step()
            optimizer.zero_grad()

    def _accumulate(self, rows: list[int], size: int) -> float:
        """Add the gradients of a batch's mean loss, and return that loss.

        A CPU takes a few rows at a time. The result is the same, because no row's loss depends on another's:
        normalisation keeps its statistics.
        """
        model = self._model
        weights = self._weights[self._training_set.labels[rows]]
        whole, loss = weights.sum().item(), 0.0
        samples = self._training_set.samples
        for some in samples.pieces(rows, size) if model.device.type == "cpu" else [rows]:
            inputs = on_device(model, samples.augmented(some, size))
            labels = torch.from_numpy(self._training_set.labels[some]).to(model.device)
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
        """Share of the full rate: rising in the first tenth of the steps, then half a cosine down to zero."""
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
                    # The fused optimizer expects its state in the memory layout of the parameter.
                    value = torch.empty_like(parameters[int(place)]).copy_(value)
                kept.setdefault(int(place), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": kept})
        self.epoch, self._stale, self._best = resume.epoch, resume.stale, resume.best
        self.best_epoch = resume.best_epoch


def _parts(model: Model, config: FineTuneConfig) -> list[list[dict[str, Any]]]:
    """Parameter groups of each optimizer: the head's at its rate, the network's at its lower one.

    Weight decay is for matrices only.
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
