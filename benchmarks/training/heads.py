"""The heads that are compared on few examples: each learns from embeddings and answers with labels."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, RidgeClassifierCV
from sklearn.neighbors import KNeighborsClassifier

from adapters.probe.fit import Dataset, fit
from adapters.probe.label_names import LabelNames
from benchmarks.data.spoken_names import MISLEADING, OPAQUE, SWAPPED, TRUE
from models.arrays import Doubles, Floats

Labels = NDArray[np.str_]
# Training rows, their labels, and rows to answer -> labels of these.
Head = Callable[[Floats, Labels, Floats], Labels]

OURS = "Topwork"
NAMES_ALONE = "names alone"
NAMED: Mapping[str, str] = {
    TRUE: "Topwork with names",
    SWAPPED: "with swapped names",
    OPAQUE: "with opaque names",
    MISLEADING: "with misleading names",
}
"""Ours with names of each kind."""

_TIP_SHARPNESS = 5.5  # beta of Tip-Adapter (Zhang et al. 2022), as published
WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of kernels, as multiples of the median squared distance
RIDGES = (0.001, 0.01, 0.1, 1.0, 10.0)


def _ours(train: Floats, labels: Labels, test: Floats, names: LabelNames = LabelNames()) -> Labels:
    digests = [hashlib.sha256(row.tobytes()).hexdigest() for row in train]
    head = fit(Dataset(train, labels.tolist(), digests, "classification", "few-shot", names=names)).head
    return _named(np.array(head.labels), head.predict(test).probabilities)


def _logistic(train: Floats, labels: Labels, test: Floats) -> Labels:
    """LogisticRegressionCV; without a second example of a label, LogisticRegression of strength 1."""
    # With an L2 penalty the solution lies in the span of the rows, so it is the same in their coordinates.
    if len(train) < train.shape[1]:
        basis = np.linalg.qr(train.astype(np.float64).T)[0]
        train, test = train @ basis, test @ basis
    most = int(np.unique(labels, return_counts=True)[1].max())
    if most < 2:
        model = LogisticRegression(max_iter=1_000)
    else:
        model = LogisticRegressionCV(
            Cs=10,
            cv=min(5, most),
            max_iter=1_000,
            l1_ratios=(0.0,),
            scoring="accuracy",
            use_legacy_attributes=False,
        )
    return _answers(model, train, labels, test)


def _discriminant(train: Floats, labels: Labels, test: Floats) -> Labels:
    """LDA with Ledoit and Wolf's shrinkage for each label; without a second example, the nearest mean."""
    if np.unique(labels, return_counts=True)[1].max() < 2:
        return _nearest_mean(train, labels, test)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    return _answers(model, train, labels, test)


def _gaussian(train: Floats, labels: Labels, test: Floats) -> Labels:
    """GDA without names (Wang et al. 2024): one covariance for all labels, shrunk by its trace."""
    names, own = _one_hot(labels)
    rows = _unit(train)
    means = own.T @ rows / own.sum(axis=0)[:, None]
    left = rows - own @ means
    scatter = left.T @ left
    shrunk = scatter + max(np.trace(scatter) / max(len(rows) - 1, 1), 1e-6) * np.eye(rows.shape[1])
    weights = rows.shape[1] * np.linalg.solve(shrunk, means.T)
    return _named(names, _unit(test) @ weights - 0.5 * (means.T * weights).sum(axis=0))


def _ridge(train: Floats, labels: Labels, test: Floats) -> Labels:
    return _answers(RidgeClassifierCV(alphas=np.logspace(-3, 3, 13)), train, labels, test)


def _five_neighbours(train: Floats, labels: Labels, test: Floats) -> Labels:
    model = KNeighborsClassifier(min(5, len(train)), weights="distance", metric="cosine")
    return _answers(model, train, labels, test)


def _nearest_mean(train: Floats, labels: Labels, test: Floats) -> Labels:
    names, own = _one_hot(labels)
    return _named(names, _unit(test) @ _unit(own.T @ _unit(train)).T)


def _tip_adapter(train: Floats, labels: Labels, test: Floats) -> Labels:
    """Tip-Adapter's cache without training. Without names there is nothing to weigh it against."""
    names, own = _one_hot(labels)
    return _named(names, tip_logits(train, own, test))


def tip_logits(train: Floats, own: Doubles, test: Floats) -> Doubles:
    """Return the cache's logits, float64 (m, labels). `own`: one-hot labels of the training rows."""
    likeness: Doubles = np.exp(-_TIP_SHARPNESS * (1.0 - _unit(test) @ _unit(train).T))
    return likeness @ own


def _kernel_ridge(train: Floats, labels: Labels, test: Floats) -> Labels:
    """ProKeR (Bendou et al. 2025) without names: its prior is zero. Closed-form leave-one-out chooses."""
    names, own = _one_hot(labels)
    return _named(names, kernel_ridge(_unit(train), own, _unit(test)))


def kernel_ridge(train: Doubles, residuals: Doubles, test: Doubles) -> Doubles:
    """Return the values of an RBF kernel ridge regression at the test rows, float64 (m, labels).

    `residuals`: (n, labels), what the prior does not explain. Width and ridge have the least squared error of
    leave-one-out.
    """
    distances = _squared_distances(train, train)
    usual = float(np.median(distances[np.triu_indices(len(train), 1)])) or 1.0
    best = (np.inf, 0.0, np.zeros_like(residuals))
    for width in WIDTHS:
        gamma = 1.0 / (width * usual)
        values, vectors = np.linalg.eigh(np.exp(-gamma * distances))
        inside = vectors.T @ residuals
        for ridge in RIDGES:
            shrunk = 1.0 / (np.maximum(values, 0.0) + ridge)
            duals = vectors @ (shrunk[:, None] * inside)
            left_out = duals / (vectors**2 @ shrunk)[:, None]
            best = min(best, (float((left_out**2).mean()), gamma, duals), key=lambda one: one[0])
    kernel: Doubles = np.exp(-best[1] * _squared_distances(test, train))
    return kernel @ best[2]


HEADS: Mapping[str, Head] = {
    OURS: _ours,
    "LogisticRegressionCV": _logistic,
    "LDA, shrinkage": _discriminant,
    "GDA": _gaussian,
    "RidgeClassifierCV": _ridge,
    "nearest mean": _nearest_mean,
    "5 neighbours": _five_neighbours,
    "Tip-Adapter": _tip_adapter,
    "kernel ridge": _kernel_ridge,
}
"""Every head that learns from examples alone."""


def heads_with_names(said: Mapping[str, LabelNames]) -> Mapping[str, Head]:
    """Return the heads that know what the labels are called. `said`: names of each kind, by kind."""

    def names_alone(train: Floats, labels: Labels, test: Floats) -> Labels:
        nothing = np.zeros((0, train.shape[1]), np.float32)
        return _ours(nothing, labels[:0], test, said[TRUE])

    return {NAMES_ALONE: names_alone} | {
        NAMED[kind]: functools.partial(_ours, names=names) for kind, names in said.items()
    }


def _answers(model: object, train: Floats, labels: Labels, test: Floats) -> Labels:
    # The warnings are of labels with fewer examples than folds and of unfinished steps.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(model.fit(train, labels).predict(test))  # type: ignore[attr-defined]


def _named(names: Labels, scores: Floats | Doubles) -> Labels:
    best: Labels = names[scores.argmax(axis=1)]
    return best


def _one_hot(labels: Labels) -> tuple[Labels, Doubles]:
    """Return the sorted labels, and 1.0 where a row has one, float64 (n, labels)."""
    names, places = np.unique(labels, return_inverse=True)
    return names, np.eye(len(names))[places]


def _unit(rows: Floats | Doubles) -> Doubles:
    rows = rows.astype(np.float64)
    unit: Doubles = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit


def _squared_distances(a: Doubles, b: Doubles) -> Doubles:
    between: Doubles = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2.0 * a @ b.T
    return np.maximum(between, 0.0)
