"""Fits a head on embeddings and measures it on examples that it did not see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from adapters.defaults import FIT_BYTES, FIT_SECONDS
from adapters.examples.copies import together, with_misled
from adapters.examples.target import ANSWER_ACCURACY, Target, Task, labels_of
from adapters.heads.head import Head
from adapters.probe.budget import FitBudget, plan, predicted_seconds
from adapters.probe.classification import fit_classification
from adapters.probe.cross_validation import FitInputs
from adapters.probe.folds import folds
from adapters.probe.label_names import LabelNames
from adapters.probe.multilabel import fit_multilabel
from adapters.probe.regression import fit_ridge
from models.arrays import Floats
from models.errors import Invalid, TooLarge

__all__ = [
    "Dataset",
    "FittedProbe",
    "OneLabel",
    "ProbeConfig",
    "TooCostly",
    "expected_seconds",
    "fit",
    "predicted_seconds",
]


_NOT_MEASURED = {
    "code": "not_measured",
    "detail": "There are too few examples to say how good it is, so it abstains on everything. Send two "
    "distinct examples of each label, or three numbers.",
}


class OneLabel(Invalid):
    """All examples have the same target, so there is nothing to tell apart."""

    code = "one_label"


class TooCostly(TooLarge):
    """The fit is predicted to take longer than allowed; `predicted_seconds` says how long."""

    code = "fit_too_large"

    def __init__(self, predicted_seconds: float, limit_seconds: float) -> None:
        super().__init__(
            f"Fitting these examples would take about {predicted_seconds:.0f} s and at most "
            f"{limit_seconds:.0f} s are allowed; send fewer examples or labels."
        )
        self.predicted_seconds = predicted_seconds
        self.limit_seconds = limit_seconds


@dataclass(frozen=True, slots=True)
class Dataset:
    """Examples ready to be fitted: one row per example, in any order."""

    embeddings: Floats  # float32 (n, dim), finite
    targets: Sequence[Target]  # n, normalised
    digests: Sequence[str]  # n, of the inputs
    task: Task
    fingerprint: str  # of the backbone that made the embeddings
    # n names that the tenant gave to what belongs together (a customer, a video), "" for none; empty without
    # groups. Examples of one group never judge each other.
    groups: Sequence[str] = ()
    # n flags, False for examples chosen because they were wrong or hard: these are learned from but not
    # measured on. Empty if all are sampled.
    sampled: Sequence[bool] = ()
    # Labels may have a name and no example, or examples and no name. For classification only.
    names: LabelNames = field(default_factory=LabelNames)


@dataclass(frozen=True, slots=True)
class ProbeConfig:
    """How to fit, and at what cost."""

    answer_accuracy: float = ANSWER_ACCURACY  # wanted among the answers that are not abstained on
    balanced: bool = False  # whether labels count as equally frequent, whatever the examples say
    # By label, how much worse it is to miss an input of it than one of a label without a cost, which is 1.
    # Costs move the answers of a classification, not what is learned, and do not go with `balanced`.
    costs: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: int = FIT_BYTES  # limit, in addition to the dataset itself
    limit_seconds: float = FIT_SECONDS  # fits that are predicted to take longer are refused

    def __post_init__(self) -> None:
        if self.balanced and self.costs:
            raise ValueError("labels are either balanced or have costs")


@dataclass(frozen=True, slots=True)
class FittedProbe:
    """A fitted head, and how well it predicts."""

    head: Head
    report: dict[str, Any]  # JSON-serialisable; suspects refer to rows of the dataset by "index"
    # float32 (n,), out of fold: 1 or 0 for the most probable label right or wrong, whatever the costs; F1 of
    # the labels for multilabel, minus the squared error for regression; NaN for those never held out.
    scores: Floats


def fit(data: Dataset, config: ProbeConfig = ProbeConfig()) -> FittedProbe:
    """Fit a head to the examples; everything reported comes from out-of-fold predictions.

    Deterministic: the same examples in any order give the same bytes. Raises OneLabel, TooCostly.
    """
    expected_seconds(data, config)
    names = _names(data)
    n, dim = data.embeddings.shape
    order = _canonical_order(data)
    embeddings = np.ascontiguousarray(data.embeddings[order], dtype=np.float32)
    targets = [data.targets[row] for row in order]
    digests = [data.digests[row] for row in order]
    tenant_groups = [data.groups[row] for row in order] if data.groups else ()
    sampled = np.array([data.sampled[row] for row in order] if data.sampled else np.ones(n), dtype=np.bool_)
    belonging = together(embeddings, digests, tenant_groups)
    keys = with_misled(belonging.keys, embeddings, targets, sampled)
    groups = np.unique(np.array(keys), return_inverse=True)[1]
    per_label = _per_label(keys, targets) if data.task == "classification" else None
    course = plan(n, dim, len(names), int(groups.max(initial=-1)) + 1, per_label)
    dealt = folds(keys, targets, course.folds)
    used = np.unique(dealt[dealt >= 0])
    # A single fold measures nothing.
    dealt = (
        np.where(dealt < 0, -1, np.searchsorted(used, dealt)) if len(used) > 1 else np.full_like(dealt, -1)
    )
    prepared = FitInputs(
        embeddings=embeddings,
        folds=dealt,
        groups=groups,
        sampled=sampled,
        plan=course,
        fingerprint=data.fingerprint,
        answer_accuracy=config.answer_accuracy,
        balanced=config.balanced,
        costs=config.costs,
        memory_bytes=config.memory_bytes - embeddings.nbytes,
    )
    more = {"near_copies": belonging.near_copies}
    if data.task == "regression":
        head, report, scores = fit_ridge(prepared, np.array(targets, dtype=np.float64))
        return _in_order(order, head, {**report, **more}, scores)
    place = {name: index for index, name in enumerate(names)}
    if data.task == "classification":
        labels = np.array([place[str(target)] for target in targets], dtype=np.int64)
        head, report, scores = fit_classification(prepared, labels, names, data.names)
    else:
        assigned = np.zeros((n, len(names)), dtype=np.bool_)
        for row, target in enumerate(targets):
            assigned[row, [place[label] for label in labels_of(target)]] = True
        head, report, scores = fit_multilabel(prepared, assigned, names)
    method = "not measured"
    if head.measured and len(used) > 1:
        method = _method(len(used), course)
    elif np.isfinite(scores).any():
        method = "names alone"
    return _in_order(order, head, {**report, **more, "method": method}, scores)


def expected_seconds(data: Dataset, config: ProbeConfig = ProbeConfig()) -> float:
    """Return the seconds that `fit` should take. Raises OneLabel and TooCostly, as `fit` does."""
    n, dim = data.embeddings.shape
    predicted = predicted_seconds(n, dim, len(_names(data)), data.task)
    if predicted > config.limit_seconds:
        raise TooCostly(predicted, config.limit_seconds)
    return predicted


def _method(folds: int, course: FitBudget) -> str:
    measured = max(course.held_out, 0 if course.share > 1 else course.searched)
    if measured < folds:
        return f"{measured} of {folds} folds held out"
    return f"{folds}-fold out-of-fold"


def _names(data: Dataset) -> tuple[str, ...]:
    """Return the sorted labels, none for regression. Raises OneLabel."""
    if len(set(data.targets) | set(data.names.directions)) < 2:
        raise OneLabel(
            "All examples have the same target, so there is nothing to learn. "
            "Send examples of at least two labels."
        )
    if data.task == "classification":
        return tuple(sorted({str(target) for target in data.targets} | set(data.names.directions)))
    if data.task == "multilabel":
        return tuple(sorted({label for target in data.targets for label in labels_of(target)}))
    return ()


def _per_label(keys: Sequence[str], targets: Sequence[Target]) -> int | None:
    """Return the number of groups of the median group's label, among labels with two or more, or None."""
    sizes = Counter(target for _, target in set(zip(keys, targets, strict=True)))
    many = sorted(size for size in sizes.values() if size > 1)
    half = sum(many) / 2.0
    return next((size for size, there in zip(many, accumulate(many), strict=True) if there >= half), None)


def _canonical_order(data: Dataset) -> list[int]:
    """Return the rows in an order that depends only on their content, so that sums round alike."""
    copies = Counter(zip(data.digests, data.targets, strict=True))

    def key(row: int) -> tuple[str, Target, bytes]:
        digest, target = data.digests[row], data.targets[row]
        # The embedding of one input may differ in its last bits between batches.
        return digest, target, data.embeddings[row].tobytes() if copies[digest, target] > 1 else b""

    return sorted(range(len(data.digests)), key=key)


def _in_order(order: list[int], head: Head, report: dict[str, Any], scores: Floats) -> FittedProbe:
    """Map canonical rows back to the caller's, and add a warning if the head was not measured."""
    if not head.measured:
        report["warnings"] = [*report["warnings"], dict(_NOT_MEASURED)]
    back = np.empty(len(order), dtype=np.float32)
    back[order] = scores
    for suspect in report.get("suspects", ()):
        suspect["index"] = order[suspect["index"]]
    return FittedProbe(head, report, back)
