"""Chooses the strength of regularisation on examples held out, folds and strengths together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapters.probe.budget import FitBudget
from adapters.probe.logistic import Design, Link, solve
from models.arrays import Floats

Loss = Callable[[Floats, NDArray[np.int64], float], tuple[float, float]]
"""Of logits (labels, m) held out, the m rows that they are of, and the strength: the mean calibrated loss,
and the slope that calibrated them, over what is usual at that strength."""

# Strengths are this one times half powers of ten: a finer grid changes no prediction that the noise would
# not.
MIDDLE_STRENGTH = 0.3
_STEP = 10.0**0.5
_LOWEST, _HIGHEST = -3, 7
_DECADES_DEVIATION = 0.7

# Loss per example, in nats, that a solution may be short of: strengths differ by ten times as much. The loss
# of few held out is not known so well: at 100 examples 0.05 / n is about a hundredth of its standard error.
_FOLD_TOLERANCE = 1e-4
_FOLD_TOLERANCE_OF_ONE = 0.05
_FOLD_STEPS = 60
_FINAL_STEPS = 150


@dataclass(frozen=True, slots=True)
class FitInputs:
    """What fitting labels starts from.

    embeddings: float32 (n, dim) in canonical order; they are overwritten. folds: (n,) in 0..k-1, or -1 for
    what is never held out. groups: (n,), the same number for examples that never judge each other. sampled:
    bool (n,), what is measured on; the others are only learned from. balanced: see ProbeConfig.
    memory_bytes: for everything but the embeddings.
    """

    embeddings: Floats
    folds: NDArray[np.int64]
    groups: NDArray[np.int64]
    sampled: NDArray[np.bool_]
    plan: FitBudget
    fingerprint: str
    answer_accuracy: float
    balanced: bool
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """The strength, the rows held out (m,) and their logits (labels, m), final weights (labels, p)."""

    strength: float
    rows: NDArray[np.int64]
    logits: Floats
    weights: Floats


@dataclass(frozen=True, slots=True)
class CrossValidation:
    """Solves of one link over folds, shared between strengths by warm starts.

    folds: (n,) in 0..k-1 or -1 for rows always trained on. training: (k, n), the weights of rows in each
    fold's training, zero for those held out. memory_bytes: for all arrays together.
    """

    design: Design
    link: Link
    labels: int
    folds: NDArray[np.int64]
    training: Floats
    memory_bytes: int

    def choose(
        self, plan: FitBudget, share: NDArray[np.int64], loss: Loss, intercepts: Floats | None = None
    ) -> Chosen:
        """Seeks the strength as planned, solves the folds to hold out, then all rows.

        share: the ascending rows that take part in the search. intercepts: (labels, folds), to begin with.
        Without folds the middle strength is taken.
        """
        count = len(self.training)
        if not count:
            nothing = np.zeros((self.labels, 0), dtype=np.float32)
            final = self.final(MIDDLE_STRENGTH, None, plan.tolerance)
            return Chosen(MIDDLE_STRENGTH, np.zeros(0, dtype=np.int64), nothing, final)
        if plan.share > 1:
            part = CrossValidation(
                self.design.of(share),
                self.link.of(share),
                self.labels,
                self.folds[share],
                self.training[:, share],
                self.memory_bytes,
            )
            strength, weights, _ = part._search(
                min(plan.searched, count),
                lambda logits, rows, strength: loss(logits, share[rows], strength),
                intercepts,
            )
            solved = 0
            rows, logits = np.zeros(0, dtype=np.int64), np.zeros((self.labels, 0), dtype=np.float32)
        else:
            solved = min(plan.searched, count)
            strength, weights, logits = self._search(solved, loss, intercepts)
            rows = self._rows(range(solved))
        others = range(solved, min(plan.held_out, count))
        if others:
            # From what the solutions so far have in common.
            start = np.repeat(weights.mean(axis=1, keepdims=True), len(others), axis=1)
            more, more_logits = self._solve(others, strength, start)
            weights = np.concatenate([weights, more], axis=1) if solved else more
            order = np.argsort(np.concatenate([rows, self._rows(others)]), kind="stable")
            rows = np.concatenate([rows, self._rows(others)])[order]
            logits = np.concatenate([logits, more_logits], axis=1)[:, order]
        return Chosen(
            strength, rows, logits, self.final(strength, weights.mean(axis=1, keepdims=True), plan.tolerance)
        )

    def _search(self, count: int, loss: Loss, intercepts: Floats | None) -> tuple[float, Floats, Floats]:
        """Climbs down the loss of the first folds over strengths: the best one, its weights and logits."""
        folds = range(count)
        rows = self._rows(folds)
        found: dict[int, tuple[float, Floats, Floats]] = {}
        slopes: dict[int, float] = {}

        def visit(place: int, start: Floats | None) -> float:
            if place not in found:
                weights, logits = self._solve(folds, strength_at(place), start)
                value, slopes[place] = loss(logits, rows, strength_at(place))
                found[place] = value, weights, logits
            return found[place][0]

        start = None
        if intercepts is not None:
            start = np.zeros((self.labels, count, self.design.rows.shape[1]), dtype=np.float32)
            start[:, :, -1] = intercepts[:, :count]
        visit(0, start)
        best = 0
        # Which side to look on first. On seven sets the best was beyond the middle nearly always where logits
        # wanted to be larger than usual there; elsewhere it was on either side, and weaker solves sooner.
        for direction in (1, -1) if slopes[0] > 1.0 else (-1, 1):
            while _LOWEST <= best + direction <= _HIGHEST:
                if visit(best + direction, found[best][1]) >= found[best][0]:
                    break
                # Of many labels the logits are large, and only those of the best are needed again.
                del found[best]
                best += direction
            if best:
                break
        _, weights, logits = found[best]
        return strength_at(best), weights, logits

    def final(self, strength: float, start: Floats | None, tolerance: float) -> Floats:
        """The solution (labels, p) on all rows."""
        return solve(
            self.design,
            self.link,
            self.labels,
            np.ones((1, len(self.folds)), dtype=np.float32),
            np.array([strength], dtype=np.float32),
            start=start,
            tolerance=tolerance,
            max_iterations=_FINAL_STEPS,
        ).weights[:, 0]

    def _rows(self, folds: range) -> NDArray[np.int64]:
        return np.flatnonzero((self.folds >= folds.start) & (self.folds < folds.stop))

    def _solve(self, folds: range, strength: float, start: Floats | None) -> tuple[Floats, Floats]:
        """Weights (labels, folds, p), and logits (labels, m) of the rows that the folds hold out."""
        n, p = self.design.rows.shape
        # Three arrays of logits, and weights, gradients and directions, per problem; as much again for the
        # rest.
        together = max(1, self.memory_bytes // (8 * self.labels * (3 * n + 7 * p)))
        rows = self._rows(folds)
        weights = np.empty((self.labels, len(folds), p), dtype=np.float32)
        logits = np.empty((self.labels, len(rows)), dtype=np.float32)
        for begin in range(0, len(folds), together):
            some = folds[begin : begin + together]
            these = slice(begin, begin + len(some))
            solution = solve(
                self.design,
                self.link,
                self.labels,
                self.training[some.start : some.stop],
                np.full(len(some), strength, dtype=np.float32),
                start=None if start is None else start[:, these],
                tolerance=max(_FOLD_TOLERANCE, _FOLD_TOLERANCE_OF_ONE / n),
                max_iterations=_FOLD_STEPS,
            )
            weights[:, these] = solution.weights
            own = self._rows(some)
            logits[:, np.searchsorted(rows, own)] = solution.logits_of(self.folds[own] - some.start, own)
        return weights, logits


def strength_penalty(strength: float, held_out: int) -> float:
    """Loss per example held out that a strength has to make up for: few examples say little about it.

    From 2 to 10 examples a label the middle one was within a point of the best on nine sets.
    """
    decades = math.log10(strength / MIDDLE_STRENGTH)
    return 0.5 * (decades / _DECADES_DEVIATION) ** 2 / max(held_out, 1)


def strength_at(place: int) -> float:
    """The strength at a place of the grid."""
    return MIDDLE_STRENGTH * _STEP**place
