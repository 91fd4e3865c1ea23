"""Predicts the cost of a fit, and chooses folds, steps and tolerance to match."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.examples.target import Task

FEW_EXAMPLES = 500
_FOLDS_OF_FEW = 10
_FOLDS = 5

# Measured on one thread of a shared EPYC server of 2021, at 2.45 GHz.
_FLOPS = 50e9
_SECONDS_PER_LOGIT = 9e-9
_SECONDS_PER_EXAMPLE = 3e-5
_SECONDS_PER_EIGENVALUE_CUBED = 4e-10
_SECONDS_AT_LEAST = 0.02

# Solver steps that a fit is expected to take.
_SEARCH_STEPS = 40  # one fold through all strengths of the search
_FOLD_STEPS = 14  # another fold at the chosen strength, from a near start
_FINAL_STEPS = 35  # all examples
_COLD_STEPS = 20  # one fold of an expensive fit
_DEAR_FINAL_STEPS = 15  # all examples of an expensive fit

# Multiplications per step below which all folds take part in the search; otherwise two do.
_CHEAP_STEP = 1 << 25
# Solver seconds above which a fit is expensive: the strength is then sought on a share of the examples, and
# fewer folds are held out.
_DEAR = 12.0
_SEARCH_SECONDS = 4.0
_HELD_OUT_SECONDS = 8.0
_COLUMNS_OF_DEAR = 192


@dataclass(frozen=True, slots=True)
class FitBudget:
    """How to fit logistic regressions, and how long that should take."""

    folds: int  # number of folds that the examples are dealt into
    searched: int  # folds on which strengths are compared
    held_out: int  # folds whose predictions are measured; the other folds are only trained on
    share: int  # n, if every n-th example of a label takes part in the search
    columns: int  # leading directions of the features that are kept
    tolerance: float  # of the final solution, in nats per example
    seconds: float  # predicted duration


def fold_count(examples: int, per_label: int | None = None) -> int:
    """Return the number of folds for `examples` distinct inputs.

    Few inputs get more folds, because training misses every example held out. There are no more folds than a
    label usually has examples (`per_label`): otherwise a label with one example left would lose to a label
    that still has two.
    """
    most = _FOLDS_OF_FEW if examples < FEW_EXAMPLES else _FOLDS
    return max(2, min(most, examples, most if per_label is None else per_label))


def plan(
    n: int, dim: int, labels: int, distinct: int | None = None, per_label: int | None = None
) -> FitBudget:
    """Return the budget for n examples, `distinct` of them different, with `dim` columns.

    `per_label`: number of distinct examples that a label usually has.
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
    # Two examples of every label must remain, or there is nothing to hold out.
    share = int(max(1, min(2 * _SEARCH_STEPS * step // _SEARCH_SECONDS, n // (4 * labels))))
    held_out = int(max(1, min(folds, _HELD_OUT_SECONDS // (_COLD_STEPS * step))))
    seconds = step * (2 * _SEARCH_STEPS / share + held_out * _COLD_STEPS + _DEAR_FINAL_STEPS)
    return FitBudget(folds, 2, held_out, share, columns, 1e-5, fixed + seconds)


def predicted_seconds(n: int, dim: int, labels: int, task: Task) -> float:
    """Return the seconds that `fit.fit` should take on one thread of a current server core."""
    if task == "regression":
        m = min(n, dim)
        products = 4.0 * n * dim * m / _FLOPS + m**3 * _SECONDS_PER_EIGENVALUE_CUBED
        return _SECONDS_AT_LEAST + n * _SECONDS_PER_EXAMPLE + products
    return plan(n, dim, labels).seconds


def _step_seconds(n: int, columns: int, labels: int) -> float:
    """Return the seconds of one step of one problem: two products, and the elementwise work on its logits."""
    return n * labels * (4.0 * columns / _FLOPS + _SECONDS_PER_LOGIT)


def _basis_seconds(n: int, dim: int) -> float:
    """Return the seconds for the features, their directions, and the novelty region."""
    m = min(n, dim, 512)
    return m**3 * _SECONDS_PER_EIGENVALUE_CUBED + 2.0 * n * dim * (m + 200) / _FLOPS
