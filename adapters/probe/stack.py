"""The logits of a classification's members on examples that they have not learned from, and their blend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adapters.probe.calibration import slopes
from adapters.probe.cross_validation import FitInputs
from models.arrays import Bools, Floats, Integers

# Parts of the examples, each of which is predicted with slopes that the other parts give.
_PARTS = 10
# Held-out examples above which slopes are not found without each part: a tenth no longer moves them.
_MANY = 2_000


@dataclass(frozen=True, slots=True)
class Stack:
    """The logits of every member on m examples that it has not learned from."""

    rows: Integers  # (m,), of the data
    own: Integers  # (m,), labels
    first: Floats  # (labels, m), of the logistic regression; zero where only names can tell
    second: Floats  # (labels, m), of the discriminant; zero where only names can tell
    hints: Floats | None  # (labels, m), of the names

    def part(self, which: Integers) -> Stack:
        """Return these examples."""
        hints = None if self.hints is None else self.hints[:, which]
        return Stack(self.rows[which], self.own[which], self.first[:, which], self.second[:, which], hints)

    def blend(self, priors: Floats, usual: float) -> slopes.Blend:
        """Return the slopes that suit these examples."""
        return slopes.blend(self.first, self.second, priors, self.own, usual, self.hints)

    def logits(self, found: slopes.Blend, priors: Floats) -> Floats:
        """Return the blended logits (labels, m)."""
        logits = found.slope * self.first + found.other * self.second
        if self.hints is not None:
            logits += np.float32(found.named) * self.hints
        logits += priors[:, None]
        return logits


@dataclass(frozen=True, slots=True)
class Judges:
    """The examples that members are judged by."""

    own: Integers  # (n,), labels of all examples
    sampled: Bools  # (n,)
    alone: Integers  # rows that no fold holds out; the names, which have not learned from them, can be judged
    hints: Floats | None  # (labels, n), logits of the names
    tellable: bool  # whether they have two labels

    def stack(self, rows: Integers, first: Floats, second: Floats) -> Stack:
        """Return the judging examples. `first`, `second`: (labels, m), of the rows (m,) held out."""
        if not self.tellable:
            rows, first, second = rows[:0], first[:, :0], second[:, :0]
        elif not self.sampled[rows].all():
            some = self.sampled[rows]
            rows, first, second = rows[some], first[:, some], second[:, some]
        if len(self.alone) and self.tellable:
            nothing = np.zeros((len(first), len(self.alone)), dtype=np.float32)
            rows = np.concatenate([rows, self.alone])
            first, second = np.concatenate([first, nothing], 1), np.concatenate([second, nothing], 1)
        hints = None if self.hints is None else self.hints[:, rows]
        return Stack(rows, self.own[rows], first, second, hints)


def judges_of(data: FitInputs, own: Integers, hints: Floats | None, known: Bools | None) -> Judges:
    """Return the examples to judge by. `hints`: (labels, n) of names. `known`: (labels,), which have one."""
    held = data.sampled & (data.folds >= 0)
    alone = np.zeros(0, dtype=np.int64)
    if known is not None:
        alone = np.flatnonzero(data.sampled & (data.folds < 0) & known[own])
        held[alone] = True
    return Judges(own, data.sampled, alone, hints, len(np.unique(own[held])) > 1)


def held_out_logits(
    held: Stack, found: slopes.Blend, priors: Floats, usual: float, groups: Integers, trained_share: float
) -> Floats:
    """Return logits (labels, m); with names, each with slopes that other groups of examples give.

    The weight of names decides many answers. Chosen on the examples that it is measured on, it makes names
    without any meaning look useful.
    """
    if held.hints is None or not 1 < len(held.rows) <= _MANY:
        return held.logits(found, priors)
    logits = np.empty_like(held.first)
    parts = groups[held.rows] % _PARTS
    for part in np.unique(parts):
        inside, outside = np.flatnonzero(parts == part), np.flatnonzero(parts != part)
        other = slopes.grown(held.part(outside).blend(priors, usual), trained_share)
        logits[:, inside] = held.part(inside).logits(other, priors)
    return logits
