"""What a fit will cost, and how far to go at that price."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.examples.target import Task

FEW_EXAMPLES = 500
_FOLDS_OF_FEW = 10
_FOLDS = 5

# Measured on one thread of an EPYC of 2021 at 2.45 GHz, which it shared with others.
_FLOPS = 50e9
_SECONDS_PER_LOGIT = 9e-9
_SECONDS_PER_EXAMPLE = 3e-5
_SECONDS_PER_EIGENVALUE_CUBED = 4e-10
_SECONDS_AT_LEAST = 0.02

# Steps of the solver: on the way through the strengths, from a near start, and to the end.
_SEARCH_STEPS = 40
_FOLD_STEPS = 14
_FINAL_STEPS = 35
_COLD_STEPS = 20
_DEAR_FINAL_STEPS = 15

# All folds search where a step through them costs less than this many multiplications, else two of them.
_CHEAP_STEP = 1 << 25
# Beyond these seconds the strength is sought on a share of the examples, and fewer folds are held out.
_DEAR = 12.0
_SEARCH_SECONDS = 4.0
_HELD_OUT_SECONDS = 8.0
_COLUMNS_OF_DEAR = 192


@dataclass(frozen=True, slots=True)
class FitBudget:
    """How a fit of logistic regressions goes.

    folds: how many the examples are dealt into. searched: folds on which strengths are compared. held_out:
    folds whose predictions are measured; the others' examples are only trained on. share: every how manyth
    example of a label takes part in the search. columns: leading directions of the features that are kept.
    seconds: predicted.
    """

    folds: int
    searched: int
    held_out: int
    share: int
    columns: int
    tolerance: float
    seconds: float


def fold_count(examples: int, per_label: int | None = None) -> int:
    """Folds for so many distinct inputs: many where every example that is held out is missed.

    Not more than a label usually has examples, so that every label misses as much in each fold: what has one
    example left would lose to what still has two.
    """
    most = _FOLDS_OF_FEW if examples < FEW_EXAMPLES else _FOLDS
    return max(2, min(most, examples, most if per_label is None else per_label))


def plan(
    n: int, dim: int, labels: int, distinct: int | None = None, per_label: int | None = None
) -> FitBudget:
    """How to fit n examples (distinct of them different) with so many columns and labels.

    per_label: distinct examples that a label usually has.
    """
    folds = fold_count(n if distinct is None else distinct, per_label)
    columns = min(n, dim)
    searched = folds if folds * labels * n * columns < _CHEAP_STEP else 2
    step = _step_seconds(n, columns, labels)
    steps = searched * _SEARCH_STEPS + (folds - searched) * _FOLD_STEPS + _FINAL_STEPS
    fixed = _SECONDS_AT_LEAST + n * _SECONDS_PER_EXAMPLE + _basis_seconds(n, dim)
    if step * steps <= _DEAR:
        return FitBudget(folds, searched, folds, 1, dim, 1e-6, fixed + step * steps)
    columns = min(columns, _COLUMNS_OF_DEAR)
    step = _step_seconds(n, columns, labels)
    # Two examples of every label must be left, or there is nothing to hold out.
    share = int(max(1, min(2 * _SEARCH_STEPS * step // _SEARCH_SECONDS, n // (4 * labels))))
    held_out = int(max(1, min(folds, _HELD_OUT_SECONDS // (_COLD_STEPS * step))))
    seconds = step * (2 * _SEARCH_STEPS / share + held_out * _COLD_STEPS + _DEAR_FINAL_STEPS)
    return FitBudget(folds, 2, held_out, share, columns, 1e-5, fixed + seconds)


def predicted_seconds(n: int, dim: int, labels: int, task: Task) -> float:
    """Seconds that linear_probe.fit is expected to take on one thread of a current server core."""
    if task == "regression":
        m = min(n, dim)
        products = 4.0 * n * dim * m / _FLOPS + m**3 * _SECONDS_PER_EIGENVALUE_CUBED
        return _SECONDS_AT_LEAST + n * _SECONDS_PER_EXAMPLE + products
    return plan(n, dim, labels).seconds


def _step_seconds(n: int, columns: int, labels: int) -> float:
    """One step of one problem: two products, and what is done to every logit."""
    return n * labels * (4.0 * columns / _FLOPS + _SECONDS_PER_LOGIT)


def _basis_seconds(n: int, dim: int) -> float:
    """Features, their directions, and the region."""
    m = min(n, dim, 512)
    return m**3 * _SECONDS_PER_EIGENVALUE_CUBED + 2.0 * n * dim * (m + 200) / _FLOPS
