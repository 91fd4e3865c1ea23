"""Many L2-regularised logistic regressions on the same rows, solved together.

Folds and strengths share every matrix product, because their weights are stacked. The method is nonlinear
conjugate gradients (Polak-Ribière+) with a step that is exact to second order. The preconditioner works in
the eigenbasis of the rows' second moments, where the Hessian is nearly diagonal for every strength. It is the
Kronecker approximation of the Hessian: mean p(1-p) per label times the eigenvalue (Böhning 1992 has the
bound, Martens and Grosse 2015 the approximation). It takes about ten products instead of a hundred.

Calls share no state. Within a call, nothing is thread-safe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from models.arrays import Doubles, Floats, Integers

# Regularisation of the intercept: just enough to keep it finite for a label that every example has, or none.
INTERCEPT_STRENGTH = 1e-3
# Logits per block of rows, about; elementwise passes over a block stay in the cache.
_BLOCK_LOGITS = 1 << 16
# Smallest number of rows per block; products of fewer rows are slow.
_BLOCK_ROWS = 192
# Steps at which the curvature is measured again; after the last one the preconditioner is good enough.
_REFRESH = frozenset({0, 1, 2, 5, 10, 20})


@dataclass(frozen=True, slots=True)
class Design:
    """Rows for the solver, and what is known about their second moments."""

    rows: Floats  # (n, p), the last column is one for the intercept
    # (p,), eigenvalues of rows'rows along each column if columns are eigenvectors (`directions` is None);
    # otherwise one value for everything outside the directions.
    moments: Floats
    directions: Floats | None = None  # (p, r), orthonormal leading eigenvectors
    leading: Floats | None = None  # (r,), their eigenvalues

    def of(self, rows: Integers) -> Design:
        """Return the design of these rows."""
        share = np.float32(len(rows) / len(self.rows))
        leading = None if self.leading is None else self.leading * share
        return Design(self.rows[rows], self.moments * share, self.directions, leading)


class Link(Protocol):
    """A loss on logits (labels, problems, rows), block by block."""

    joint: bool

    def of(self, rows: Integers) -> Link:
        """Return the loss on these rows."""
        ...

    def loss(self, logits: Floats, probabilities: Floats, rows: slice, weights: Floats) -> Doubles:
        """Return the summed loss, (1 or labels, problems), and fill `probabilities`."""
        ...

    def residual(self, probabilities: Floats, rows: slice, weights: Floats) -> Floats:
        """Return the derivative of the loss with respect to the logits."""
        ...

    def curvature(self, probabilities: Floats, along: Floats, weights: Floats) -> Doubles:
        """Return the second derivative of the summed loss along a direction of logits, shaped like `loss`."""
        ...


class Softmax:
    """Cross-entropy of softmax, for one label out of many. `labels`: int (n,)."""

    joint = True

    def __init__(self, labels: Integers) -> None:
        self._labels = labels

    def of(self, rows: Integers) -> Softmax:
        return Softmax(self._labels[rows])

    def loss(self, logits: Floats, probabilities: Floats, rows: slice, weights: Floats) -> Doubles:
        top = logits.max(axis=0)
        np.subtract(logits, top, out=probabilities)
        labels = self._labels[rows]
        own = probabilities[labels, :, np.arange(len(labels))].T
        np.exp(probabilities, out=probabilities)
        total = probabilities.sum(axis=0)
        probabilities *= 1.0 / total
        loss: Doubles = np.einsum("qn,qn->q", np.log(total) - own, weights, dtype=np.float64)
        return loss[None]

    def residual(self, probabilities: Floats, rows: slice, weights: Floats) -> Floats:
        labels = self._labels[rows]
        residual = probabilities * weights
        residual[labels, :, np.arange(len(labels))] -= weights.T
        return residual

    def curvature(self, probabilities: Floats, along: Floats, weights: Floats) -> Doubles:
        product = probabilities * along
        mean = product.sum(axis=0)
        product *= along
        variance = product.sum(axis=0)
        variance -= mean * mean
        curvature: Doubles = np.einsum("qn,qn->q", variance, weights, dtype=np.float64)
        return curvature[None]


class Sigmoid:
    """One logistic regression per label, each yes or no. `targets`: float32 (labels, n), of 0 and 1."""

    joint = False

    def __init__(self, targets: Floats) -> None:
        self._targets = targets

    def of(self, rows: Integers) -> Sigmoid:
        return Sigmoid(self._targets[:, rows])

    def loss(self, logits: Floats, probabilities: Floats, rows: slice, weights: Floats) -> Doubles:
        targets = self._targets[:, None, rows]
        np.abs(logits, out=probabilities)
        np.negative(probabilities, out=probabilities)
        np.exp(probabilities, out=probabilities)
        loss = np.log1p(probabilities)
        loss += np.maximum(logits, 0)
        loss -= targets * logits
        np.divide(1.0, 1.0 + probabilities, out=probabilities)
        np.copyto(probabilities, 1.0 - probabilities, where=logits < 0)
        total: Doubles = np.einsum("cqn,qn->cq", loss, weights, dtype=np.float64)
        return total

    def residual(self, probabilities: Floats, rows: slice, weights: Floats) -> Floats:
        residual = probabilities - self._targets[:, None, rows]
        residual *= weights
        return residual

    def curvature(self, probabilities: Floats, along: Floats, weights: Floats) -> Doubles:
        product = probabilities * (1.0 - probabilities)
        product *= along
        product *= along
        curvature: Doubles = np.einsum("cqn,qn->cq", product, weights, dtype=np.float64)
        return curvature


@dataclass(frozen=True, slots=True)
class Solution:
    """The weights of every problem, and the logits that they give every row."""

    weights: Floats  # (labels, problems, p)
    logits: list[Floats]  # (labels, problems, rows of the block), one array per block of rows
    blocks: list[slice]
    iterations: int  # steps taken

    def logits_of(self, problems: Integers, rows: Integers) -> Floats:
        """Return the logits (labels, m) of m ascending rows, each from its own entry of `problems` (m,)."""
        parts = []
        for logits, block in zip(self.logits, self.blocks, strict=True):
            own = slice(*np.searchsorted(rows, (block.start, block.stop)).tolist())
            parts.append(logits[:, problems[own], rows[own] - block.start])
        return np.concatenate(parts, axis=1)


def solve(
    design: Design,
    link: Link,
    labels: int,
    row_weights: Floats,
    strengths: Floats,
    *,
    start: Floats | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
) -> Solution:
    """Minimise sum_i row_weights[q, i] loss_i + strengths[q] / 2 |weights without intercept|² per problem q.

    `row_weights`: (problems, n); zero leaves a row out. `start`: (labels, problems, p). Stops when a Newton
    step would lower the loss by no more than `tolerance` (nats per unit of row weight) in every problem.
    """
    problem = _Problem(design, link, labels, row_weights, strengths, start)
    iteration = 0
    for iteration in range(max_iterations):
        if iteration in _REFRESH:
            problem.refresh()
        if problem.direct() <= tolerance:
            break
        problem.step()
    return Solution(problem.weights, problem.logits, problem.blocks, iteration)


class _Problem:
    """The state of one solve."""

    def __init__(
        self,
        design: Design,
        link: Link,
        labels: int,
        row_weights: Floats,
        strengths: Floats,
        start: Floats | None,
    ) -> None:
        n, p = design.rows.shape
        count = len(strengths)
        self._design = design
        self._link = link
        self._row_weights = np.ascontiguousarray(row_weights, dtype=np.float32)
        self._mass = self._row_weights.sum(axis=1, dtype=np.float64)
        self._penalty = np.repeat(strengths.astype(np.float32)[:, None], p, axis=1)
        self._penalty[:, -1] = INTERCEPT_STRENGTH
        self._axes = (0, 2) if link.joint else (2,)
        size = min(n, max(_BLOCK_ROWS, _BLOCK_LOGITS // (labels * count)))
        self.blocks = [slice(begin, min(n, begin + size)) for begin in range(0, n, size)]
        self._rows = [design.rows[block] for block in self.blocks]
        self._block_weights = [np.ascontiguousarray(self._row_weights[:, block]) for block in self.blocks]
        self.weights = np.zeros((labels, count, p), dtype=np.float32) if start is None else start.copy()
        flat = self.weights.reshape(labels * count, p)
        self.logits = [(flat @ rows.T).reshape(labels, count, -1) for rows in self._rows]
        self._probabilities = [np.empty_like(logits) for logits in self.logits]
        self._loss = self._evaluate(self.weights)
        self._gradient = self._slope()
        self._scaled: tuple[Floats, ...] = ()
        self._direction: Floats | None = None
        self._previous: Floats | None = None
        self._decrement: Doubles | None = None

    def _sum(self, left: Floats, right: Floats) -> Doubles:
        """Return the inner products per problem, (1 or labels, problems)."""
        if self._link.joint:
            return np.asarray(np.einsum("cqp,cqp->q", left, right)[None], dtype=np.float64)
        return np.asarray(np.einsum("cqp,cqp->cq", left, right), dtype=np.float64)

    def _evaluate(self, weights: Floats) -> Doubles:
        """Return the objective of weights whose logits are up to date, and fill the probabilities."""
        loss = 0.5 * self._sum(weights, weights * self._penalty)
        for logits, probabilities, block, row_weights in zip(
            self.logits, self._probabilities, self.blocks, self._block_weights, strict=True
        ):
            loss += self._link.loss(logits, probabilities, block, row_weights)
        return loss

    def _slope(self) -> Floats:
        gradient = self.weights * self._penalty
        flat = gradient.reshape(-1, gradient.shape[2])
        for rows, probabilities, block, row_weights in zip(
            self._rows, self._probabilities, self.blocks, self._block_weights, strict=True
        ):
            residual = self._link.residual(probabilities, block, row_weights)
            flat += residual.reshape(len(flat), -1) @ rows
        return gradient

    def refresh(self) -> None:
        """Measure the mean curvature per label and problem for the preconditioner."""
        labels, count, _ = self.weights.shape
        curvature = np.zeros((labels, count))
        for probabilities, row_weights in zip(self._probabilities, self._block_weights, strict=True):
            curvature += np.einsum("cqn,qn->cq", probabilities * (1.0 - probabilities), row_weights)
        # One logit of a softmax is redundant; the curvature along the others is higher by this factor, 2 for
        # two labels.
        surplus = labels / (labels - 1) if self._link.joint else 1.0
        mean = (np.maximum(curvature, 1e-6) * (surplus / len(self._design.rows))).astype(np.float32)[
            :, :, None
        ]
        base = 1.0 / (mean * self._design.moments + self._penalty)
        if self._design.leading is None:
            self._scaled = (base,)
            return
        # Apart from the intercept, base is one number per label and problem; leading directions correct it.
        leading = 1.0 / (mean * self._design.leading + self._penalty[:, :1]) - base[:, :, :1]
        self._scaled = (base, leading)

    def _precondition(self, gradient: Floats) -> Floats:
        result = gradient * self._scaled[0]
        if self._design.directions is not None:
            result += ((gradient @ self._design.directions) * self._scaled[1]) @ self._design.directions.T
        return result

    def direct(self) -> float:
        """Find the next direction; return the largest drop of loss per row that a Newton step promises."""
        scaled = self._precondition(self._gradient)
        decrement = self._sum(self._gradient, scaled)
        if self._direction is None or self._previous is None or self._decrement is None:
            self._direction = -scaled
        else:
            gained = (decrement - self._sum(self._previous, scaled)) / np.maximum(self._decrement, 1e-30)
            keep = np.clip(gained, 0.0, 10.0).astype(np.float32)
            self._direction *= keep[:, :, None]
            self._direction -= scaled
            uphill = self._sum(self._gradient, self._direction) >= 0
            if uphill.any():
                self._direction = np.where(uphill[:, :, None], -scaled, self._direction)
        self._decrement = decrement
        return float((0.5 * decrement.sum(axis=0) / np.maximum(self._mass, 1.0)).max())

    def step(self) -> None:
        """Move along the direction as far as its curvature suggests, or less if the loss would rise."""
        direction = self._direction
        assert direction is not None
        flat = direction.reshape(-1, direction.shape[2])
        along = [
            (flat @ rows.T).reshape(logits.shape)
            for rows, logits in zip(self._rows, self.logits, strict=True)
        ]
        curvature = self._sum(direction, direction * self._penalty)
        for probabilities, change, row_weights in zip(
            self._probabilities, along, self._block_weights, strict=True
        ):
            curvature += self._link.curvature(probabilities, change, row_weights)
        length = -self._sum(self._gradient, direction) / np.maximum(curvature, 1e-30)
        taken = np.zeros_like(length)
        for _ in range(20):
            move = (length - taken).astype(np.float32)[:, :, None]
            for logits, change in zip(self.logits, along, strict=True):
                logits += move * change
            self.weights += move * direction
            taken = length.copy()
            loss = self._evaluate(self.weights)
            worse = loss > self._loss + 1e-6 * np.abs(self._loss)
            if not worse.any():
                break
            length[worse] *= 0.3
        self._loss = loss
        self._previous = self._gradient
        self._gradient = self._slope()
