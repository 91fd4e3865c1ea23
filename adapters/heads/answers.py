"""What a head answers, and which label a classification answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.arrays import Bools, Doubles, Floats, Integers

NO_ALARM = 2.0  # a probability that no label reaches


@dataclass(frozen=True, slots=True)
class Predictions:
    """A head's predictions for n embeddings."""

    # float32 (n, labels). Rows sum to one for classification; for multilabel each label is on its own. (n, 0)
    # for regression.
    probabilities: Floats
    # float32 (n,). Probability of the answer: of the label answered, or for multilabel of the least certain
    # decision; 1 for regression.
    confidence: Floats
    # float32 (n,). Distance from the training embeddings, as a multiple of the largest accepted: above 1 is
    # out of distribution. 0 if there were too few examples to tell.
    distance: Floats
    abstention_score: Floats  # float32 (n,), grows with the doubt that the input belongs to what was taught
    abstained: Bools  # (n,)
    assigned: Bools | None = None  # (n, labels), the labels given; None unless multilabel
    # (n, labels), the decisions that should not be relied on; None unless multilabel. All of them are
    # uncertain exactly where the head abstains.
    uncertain: Bools | None = None
    values: Doubles | None = None  # (n,); None unless regression
    # (n,), the labels answered of a classification with costs; None where the most probable are answered.
    chosen: Integers | None = None

    @property
    def answers(self) -> Integers:
        """The label answered (n,), as an index, of a classification."""
        return answers_of(self.probabilities, nothing()) if self.chosen is None else self.chosen


def costs_of(costs: Mapping[str, float], labels: Sequence[str]) -> Floats:
    """Return the costs, float32 (labels,), with 1 for labels without one; (0,) if all labels cost the same.

    Costs of other labels are ignored.
    """
    found = np.array([costs.get(label, 1.0) for label in labels], dtype=np.float32)
    return found if len(found) and (found != found[0]).any() else nothing()


def answers_of(probabilities: Floats, costs: Floats) -> Integers:
    """Return the label answered (n,) for probabilities (n, labels): the one that is worst to miss.

    It is the label with the highest product of probability and cost, the first of equals. `costs`: see
    costs_of.
    """
    answers: Integers = (probabilities * costs if len(costs) else probabilities).argmax(axis=1)
    return answers


def confidence_of(probabilities: Floats, answers: Integers) -> Floats:
    """Return the probability (n,) of each answer (n,)."""
    confidence: Floats = probabilities[np.arange(len(answers)), answers]
    return confidence


def alarmed(probabilities: Floats, alarms: Floats) -> Bools:
    """Return which rows (n,) of probabilities (n, labels) reach an alarm (labels,); `alarms` is not empty."""
    reached: Bools = np.logical_or.reduce(probabilities >= alarms, axis=1)
    return reached


def nothing() -> Floats:
    """Return float32 (0,): no costs, no alarms, no decisions."""
    return np.zeros(0, dtype=np.float32)
