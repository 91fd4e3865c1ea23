"""Chooses the strength of regularisation by cross-validation, with all folds solved together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from adapters.probe.budget import FitBudget
from adapters.probe.solvers.logistic import Design, Link, solve
from models.arrays import Bools, Floats, Integers

Loss = Callable[[Floats, Integers, float], tuple[float, float]]
"""Takes held-out logits (labels, m), the m rows they belong to, and the strength. Returns the mean calibrated
loss, and the slope that calibrated the logits over the usual slope at that strength."""

# Strengths are this one times half powers of ten; a finer grid changes predictions less than noise does.
MIDDLE_STRENGTH = 0.3
_STEP = 10.0**0.5
_LOWEST, _HIGHEST = -3, 7  # positions on the grid; the middle strength is at 0
_DECADES_DEVIATION = 0.7  # standard deviation of the prior on the strength, in powers of ten

# Loss per example, in nats, that a fold's solution may be short of; strengths differ by ten times as much.
_FOLD_TOLERANCE = 1e-4
# The same for one example; n examples get 1 / n of it. At 100 that is about a hundredth of the loss's
# standard error.
_FOLD_TOLERANCE_OF_ONE = 0.05
_FOLD_STEPS = 60
_FINAL_STEPS = 150


@dataclass(frozen=True, slots=True)
class FitInputs:
    """The inputs of a fit, apart from its targets."""

    embeddings: Floats  # float32 (n, dim), in canonical order; overwritten by the fit
    folds: Integers  # (n,), in 0..k-1; -1 for rows that are never held out
    groups: Integers  # (n,), the same number for examples that never judge each other
    sampled: Bools  # bool (n,), rows that are measured on; the others are only learned from
    plan: FitBudget
    fingerprint: str  # of the backbone
    answer_accuracy: float  # see ProbeConfig
    balanced: bool  # see ProbeConfig
    costs: Mapping[str, float]  # see ProbeConfig
    memory_bytes: int  # for everything but the embeddings


@dataclass(frozen=True, slots=True)
class Chosen:
    """The chosen strength and its solutions."""

    strength: float
    rows: Integers  # (m,), the rows held out
    logits: Floats  # (labels, m), of these rows
    weights: Floats  # (labels, p), fitted on all rows


@dataclass(frozen=True, slots=True)
class CrossValidation:
    """Solves one link over folds; each strength starts from the solution of its neighbour."""

    design: Design
    link: Link
    labels: int
    folds: Integers  # (n,), in 0..k-1; -1 for rows that are always trained on
    training: Floats  # (k, n), row weights in each fold's training; zero for rows held out
    memory_bytes: int  # for all arrays together

    def choose(
        self, plan: FitBudget, share: Integers, loss: Loss, intercepts: Floats | None = None
    ) -> Chosen:
        """Search for the strength as planned, then solve the folds to hold out and all rows.

        `share`: ascending rows that take part in the search. `intercepts`: (labels, folds), to start from.
        Without folds the middle strength is used.
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
            # These folds start from the mean of the solutions so far.
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
        """Descend the loss of the first folds over strengths; return the best, its weights and its logits."""
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
        # If logits should be larger than usual, the best strength was nearly always above the middle (seven
        # sets). Otherwise it was on either side, and the weaker side, which solves faster, is tried first.
        for direction in (1, -1) if slopes[0] > 1.0 else (-1, 1):
            while _LOWEST <= best + direction <= _HIGHEST:
                if visit(best + direction, found[best][1]) >= found[best][0]:
                    break
                # Logits of many labels are large, and only the best ones are needed again.
                del found[best]
                best += direction
            if best:
                break
        _, weights, logits = found[best]
        return strength_at(best), weights, logits

    def final(self, strength: float, start: Floats | None, tolerance: float) -> Floats:
        """Return the solution (labels, p) on all rows."""
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

    def _rows(self, folds: range) -> Integers:
        return np.flatnonzero((self.folds >= folds.start) & (self.folds < folds.stop))

    def _solve(self, folds: range, strength: float, start: Floats | None) -> tuple[Floats, Floats]:
        """Return weights (labels, folds, p), and logits (labels, m) of the rows that the folds hold out."""
        n, p = self.design.rows.shape
        # A problem has three arrays of logits and seven like its weights (gradients, directions); the factor
        # of 8 is twice the size of a float32, to leave as much again for the rest.
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
    """Return the loss per held-out example that a strength must make up for.

    Few examples say little about the strength: with 2 to 10 per label the middle one was within a point of
    the best on nine sets.
    """
    decades = math.log10(strength / MIDDLE_STRENGTH)
    return 0.5 * (decades / _DECADES_DEVIATION) ** 2 / max(held_out, 1)


def strength_at(place: int) -> float:
    """Return the strength at a position of the grid."""
    return MIDDLE_STRENGTH * _STEP**place
