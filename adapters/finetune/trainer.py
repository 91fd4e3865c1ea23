"""Fine-tuning of a backbone for one adapter: first the head, with all else frozen, then all of it gently.

The order of steps is that of the Keras guide to transfer learning (https://keras.io/guides/transfer_learning):
train a new head to convergence on the frozen network, then unfreeze and train everything with a learning rate
ten to a hundred times smaller, normalisation layers still in inference mode.
docs/background/fine-tuning.md gives the source of every choice. Requires torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from adapters.finetune.config import FineTuneConfig
from adapters.finetune.full_phase import (
    Checkpoint,
    Diverged,
    FullNetworkPhase,
    HeldOutResult,
    Progress,
)
from adapters.finetune.model import (
    Model,
    State,
    TrainingSet,
    class_weights,
    embed,
    evaluate,
    freeze,
    score_of,
    state_of,
)
from models.arrays import Floats

Tell = Callable[[Progress, Checkpoint | None], None]
"""Called at the end of an epoch, with the checkpoint from which another attempt can resume."""

# Share of the best epoch in the mix with the result of phase 1 (WiSE-FT, Wortsman et al. 2022).
_MIXES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class FineTuned:
    """The result of a fine-tune; the model itself holds the network to be served."""

    measured: HeldOutResult
    refit_epochs: int  # epochs of phase 2 on all rows; 0 without a refit
    # Logits of the held-out rows after a refit, float32 (held out, labels). They are by the network that was
    # measured, which had not learned from these rows.
    logits: Floats | None


def train_head(model: Model, embeddings: torch.Tensor, labels: torch.Tensor, strength: float) -> None:
    """Phase 1: train the head to convergence with L-BFGS, with the network frozen.

    `embeddings`: float32 (n, dim), of the frozen network, computed once, as every epoch would give the same.
    `labels`: int64 (n,), rows of the head. `strength`: of the pull towards the initial head, a linear probe,
    which chose it on held-out examples. Raises Diverged.
    """
    freeze(model.network)
    head = model.head.requires_grad_(True)
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
            raise Diverged(
                "The loss of the first phase is not a number. Look for wrong labels and broken inputs."
            )
        loss.backward()
        return loss

    optimizer.step(closure)


def fine_tune(
    model: Model,
    training_set: TrainingSet,
    strength: float,
    config: FineTuneConfig = FineTuneConfig(),
    *,
    resume: Checkpoint | None = None,
    tell: Tell = lambda progress, checkpoint: None,
) -> FineTuned:
    """Run both phases, mix their results and score the mix; then do the same once more on all rows.

    `model`: begins with the head of a linear probe on the training rows, and ends as the network to serve.
    `strength`: that of the probe. `tell`: called after each epoch; may raise to stop. Raises Diverged.
    """
    if resume is not None and resume.measured is not None:
        measured = resume.measured
        training = FullNetworkPhase(
            model, training_set.whole, config, measured.first, resume, (measured, state_of(model))
        )
    else:
        training = _phases(model, training_set, strength, config, resume, tell)
        measured = _mixed(model, training_set, training)
        if not config.refit or measured.mix == 0.0:
            return FineTuned(measured, 0, None)
        state = state_of(model)
        model.load_state_dict(training.start)
        whole = training_set.whole
        _first_phase(model, whole, strength)
        training = FullNetworkPhase(model, whole, config, measured.first, refit=(measured, state))
    for progress, checkpoint in training.epochs():
        tell(progress, checkpoint)
    refitted = _between(training.start, state_of(model), measured.mix)
    model.load_state_dict(training.best_state)
    embeddings = embed(model, training_set.samples, training_set.testing)
    with torch.inference_mode():
        logits = model.head(embeddings).cpu().numpy()
    model.load_state_dict(refitted)
    freeze(model)
    return FineTuned(measured, training.epoch, logits)


def _phases(
    model: Model,
    training_set: TrainingSet,
    strength: float,
    config: FineTuneConfig,
    resume: Checkpoint | None,
    tell: Tell,
) -> FullNetworkPhase:
    """Run both phases on the training rows, to their end."""
    if resume is None:
        embeddings = _first_phase(model, training_set, strength)
        first = score_of(model, training_set, embeddings[training_set.testing])
        tell(Progress(1, 0, config.epochs, None, first, 0.1), None)
    else:
        first = resume.first
    training = FullNetworkPhase(model, training_set, config, first, resume)
    for progress, checkpoint in training.epochs():
        tell(progress, checkpoint)
    return training


def _first_phase(model: Model, training_set: TrainingSet, strength: float) -> torch.Tensor:
    """Run phase 1 on the training rows with the original network; return its embeddings of all rows."""
    if training_set.embeddings is None:
        embeddings = embed(model, training_set.samples, range(len(training_set.labels)))
    else:
        embeddings = torch.from_numpy(training_set.embeddings)
    train_head(
        model,
        embeddings[training_set.training],
        torch.from_numpy(training_set.labels[training_set.training]),
        strength,
    )
    return embeddings


def _mixed(model: Model, training_set: TrainingSet, training: FullNetworkPhase) -> HeldOutResult:
    """Leave the model at the mix of both phases with the lowest held-out loss."""
    start, best = training.start, training.best_state
    found, found_mix = training.first, 0.0
    for mix in _MIXES if training.best_epoch else ():
        model.load_state_dict(_between(start, best, mix))
        score = evaluate(model, training_set)
        if score.loss < found.loss:
            found, found_mix = score, mix
    model.load_state_dict(_between(start, best, found_mix))
    freeze(model)
    return HeldOutResult(training.first, found, found_mix, training.epoch, training.best_epoch)


def _between(start: State, end: State, mix: float) -> State:
    return {
        name: torch.lerp(value, end[name], mix) if value.is_floating_point() else value
        for name, value in start.items()
    }
