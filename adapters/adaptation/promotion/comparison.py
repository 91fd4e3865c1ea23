"""Comparison of two versions on the examples that both were measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapters.storage.formats import Evidence
from models.arrays import Floats, Integers

Pairs = Sequence[tuple[int, int]]
"""Rows of the same example in the new version's evidence and in the live one's."""


# A regression is worse only if its mean squared error is this many times larger: its errors move together.
_LARGER_ERROR = 1.25


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of two versions on the unchanged examples that both were measured on.

    `compared`: number of examples. `score`, `other`: mean scores of the new version and of the other:
    accuracy, the F1 of an example's labels for multilabel, minus the mean squared error for regression; None
    if nothing was compared. `p_value`: probability of at least as many losses if the new version were as
    good.
    """

    compared: int = 0
    score: float | None = None
    other: float | None = None
    p_value: float | None = None

    def worse(self, level: float) -> bool:
        """Whether the new version is worse, also by its mean: few large wins may outweigh many losses."""
        if self.score is None or self.other is None or self.p_value is None:
            return False
        allowed = self.other * (_LARGER_ERROR if self.other < 0.0 else 1.0)
        return self.p_value < level and self.score < allowed


NOT_COMPARED = Comparison()
"""The comparison of two versions that have no measured example in common."""


def loss_p_value(wins: int, losses: int) -> float:
    """Return the one-sided p-value of McNemar's and the sign test.

    It is the probability of at least this many losses in wins + losses fair tosses. McNemar, Psychometrika 12
    (1947); exact form as in Fagerland, Lydersen and Laake, BMC Med. Res. Methodol. 13 (2013).
    """
    tosses = wins + losses
    if tosses == 0:
        return 1.0
    if tosses > 2_000:
        # The normal approximation with continuity correction; at this size it agrees to three digits.
        z = (losses - 0.5 - tosses / 2) / math.sqrt(tosses / 4)
        return 0.5 * math.erfc(z / math.sqrt(2))
    tail: int = sum(math.comb(tosses, count) for count in range(losses, tosses + 1))
    return tail / (1 << tosses)


def common_examples(new: Evidence, live: Evidence) -> Pairs:
    """Return the rows of the examples that both versions have."""
    there = {example: place for place, example in enumerate(live.ids)}
    return [(place, there[example]) for place, example in enumerate(new.ids) if example in there]


def is_unchanged(new: Evidence, live: Evidence, here: int, there: int) -> bool:
    """Return whether the example has the same target and the same input in both versions."""
    return new.targets[here] == live.targets[there] and new.digests[here] == live.digests[there]


def columns_of(pairs: Pairs) -> tuple[Integers, Integers]:
    """Return the rows of the pairs in the new version, and those in the live one."""
    both = np.array(pairs, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def compare(scores: Floats, others: Floats) -> Comparison:
    """Compare the scores, (m,), of two versions on the same examples."""
    if not len(scores):
        return NOT_COMPARED
    wins, losses = int((scores > others).sum()), int((scores < others).sum())
    return Comparison(
        len(scores),
        float(scores.mean(dtype=np.float64)),
        float(others.mean(dtype=np.float64)),
        loss_p_value(wins, losses),
    )


def comparable_rows(new: Evidence, live: Evidence, pairs: Pairs) -> tuple[Integers, Integers]:
    """Return the rows, in new and in live, of unchanged examples that both were measured on."""
    ours, theirs = new.measured, live.measured
    return columns_of([p for p in pairs if ours[p[0]] and theirs[p[1]] and is_unchanged(new, live, *p)])
