"""Fine-tunes a backbone for one adapter: its head first, with everything else frozen, then all of it gently.

The order of steps is that of the Keras guide to transfer learning (https://keras.io/guides/transfer_learning):
train a new head to convergence on the frozen network, then unfreeze and train everything with a learning rate
ten to a hundred times smaller, normalisation layers still in inference mode. docs/fine-tuning.md gives the
source of every choice. Torch lives here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from adapters.learner import Lesson, Model, Score, State, class_weights, embed, evaluate, freeze, score_of
from adapters.second_phase import Checkpoint, Diverged, FineTuneConfig, Progress, SecondPhase

# Between the network as it came and the best one that was trained (WiSE-FT, Wortsman et al. 2022).
_MIXES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class FineTuned:
    """What came out; the model holds it. mix: how far from phase 1 (0) to the best of phase 2 (1)."""

    first: Score
    final: Score
    mix: float
    epochs: int


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
        if lesson.embeddings is None:
            embeddings = embed(model, lesson.samples, range(len(lesson.labels)))
        else:
            embeddings = torch.from_numpy(lesson.embeddings)
        labels = torch.from_numpy(lesson.labels[lesson.training])
        train_head(model, embeddings[lesson.training], labels, strength)
        first = score_of(model, lesson, embeddings[lesson.testing])
        tell(Progress(1, 0, None, first, 0.1), None)
    else:
        first = resume.first
    training = SecondPhase(model, lesson, config, first, resume)
    for progress, checkpoint in training.epochs():
        tell(progress, checkpoint)
    mix, final = _mixed(model, lesson, training.start, training.best_state, first)
    return FineTuned(first, final, mix, training.epoch)


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
