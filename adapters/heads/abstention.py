"""When a head abstains, and how strange an input looks to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adapters.examples.target import Task
from models.arrays import Floats


@dataclass(frozen=True, slots=True)
class AbstentionRule:
    """When to abstain for lack of confidence, and the usual energy of logits."""

    threshold: float = 0.0  # confidence below which no answer is given; 0 always answers
    # Mean and standard deviation of the energy of held-out examples' logits. Unfamiliar inputs have a low
    # energy, even where softmax is confident (Liu et al. 2020).
    energy_mean: float = 0.0
    energy_deviation: float = 1.0

    def surprise(self, energy: Floats) -> Floats:
        """How many standard deviations the energy lies below the mean of held-out examples."""
        result: Floats = (np.float32(self.energy_mean) - energy) / np.float32(self.energy_deviation)
        return result


def fit_abstention(threshold: float, logits: Floats, task: Task) -> AbstentionRule:
    """The abstention rule, with the energy of held-out logits (n, labels), temperature included."""
    if len(logits) < 2:
        return AbstentionRule(threshold)
    energies = energy(logits, task)
    return AbstentionRule(threshold, float(energies.mean()), max(float(energies.std()), 0.01))


def energy(logits: Floats, task: Task) -> Floats:
    """Energy (n,) of logits (n, labels): their log-sum-exp, or for multilabel its sum over single labels."""
    if task == "multilabel":
        # Each label is set against its absence, whose logit is 0.
        each: Floats = np.logaddexp(np.float32(0.0), logits).sum(axis=1)
        return each
    return softmax_and_energy(logits)[1]


def softmax_and_energy(logits: Floats) -> tuple[Floats, Floats]:
    """Probabilities (n, labels) and log-sum-exp (n,) of logits (n, labels)."""
    # Each call of numpy costs microseconds after a network has run. The ufuncs' own methods cost the least.
    top = np.maximum.reduce(logits, axis=1)
    probabilities: Floats = np.exp(logits - top[:, None])
    total = np.add.reduce(probabilities, axis=1)
    probabilities /= total[:, None]
    energies: Floats = np.log(total)
    energies += top
    return probabilities, energies


def novelty_score(surprise: Floats) -> Floats:
    """Softplus squared of a surprise: almost zero if it is negative, about the square if it is positive."""
    result: Floats = np.logaddexp(np.float32(0.0), surprise) ** 2
    return result
