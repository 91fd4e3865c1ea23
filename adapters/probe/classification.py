"""Fits and measures a head that gives every input one label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.heads.abstention import fit_abstention
from adapters.heads.head import Head, directions_for, smoothed, softmax, storable
from adapters.heads.novelty import fit_region
from adapters.heads.scaling import scaling_of
from adapters.probe.basis import basis_of
from adapters.probe.budget import FitBudget
from adapters.probe.calibration import measures, slopes
from adapters.probe.cross_validation import CrossValidation, FitInputs, strength_penalty
from adapters.probe.lda import Discriminant
from adapters.probe.logistic import Softmax
from models.arrays import Floats, Integers

# Pseudo-examples that are added to each label's count.
_PRIOR_EXAMPLES = 20.0
_MOST_SUSPECTS = 50
_MOST_CONFUSIONS = 500
_LOW_RECALL = 0.5  # recall below which a label is warned about
_MOST_NAMED = 5  # labels that the warning names


def fit_classification(
    data: FitInputs, labels: Integers, names: tuple[str, ...]
) -> tuple[Head, dict[str, Any], Floats]:
    """Return head, report and scores (n,), as in FittedProbe. `labels`: (n,), indices into `names`."""
    count = len(names)
    region = fit_region(data.embeddings, labels, data.folds, directions_for(count, data.embeddings.shape[1]))
    scaling = scaling_of(data.embeddings)
    features = scaling.apply(data.embeddings, into=data.embeddings)
    basis = basis_of(features, data.plan.columns)
    sizes = np.bincount(labels, minlength=count)
    rows = basis.design.rows[:, :-1]
    discriminant = Discriminant(rows, labels, count, data.folds, features.shape[1])
    measured_folds = range(_held_out(data.plan, data.folds))
    others = np.zeros((count, len(labels)), dtype=np.float32)
    others[:, (data.folds >= 0) & (data.folds < len(measured_folds))] = discriminant.held_out(measured_folds)
    # Label frequencies in training are subtracted from the logits, and shrunk ones are added instead.
    trained = np.log(sizes / sizes.sum()).astype(np.float32)
    priors = _priors(labels[data.sampled], count, data.balanced)
    measured = data.sampled & (data.folds >= 0)
    tellable = len(np.unique(labels[measured])) > 1
    # A held-out example is predicted without the other examples of its fold.
    trained_share = 1.0 - 1.0 / (int(data.folds.max()) + 1) if tellable else 1.0
    usual = slopes.usual_spread(count, trained_share * len(labels) / count)

    def blend(logits: Floats, rows: Integers) -> slopes.Blend:
        some = np.flatnonzero(data.sampled[rows]) if tellable else np.zeros(0, dtype=np.int64)
        return slopes.blend(
            logits[:, some] - trained[:, None], others[:, rows[some]], priors, labels[rows[some]], usual
        )

    def loss(logits: Floats, rows: Integers, strength: float) -> tuple[float, float]:
        found = blend(logits, rows)
        return found.loss + strength_penalty(strength, len(rows)), found.stretch

    chosen = CrossValidation(
        basis.design,
        Softmax(labels),
        count,
        data.folds,
        _training(labels, data.folds, sizes),
        data.memory_bytes,
    ).choose(data.plan, _share(labels, sizes, data.plan.share), loss)
    found = slopes.grown(blend(chosen.logits, chosen.rows), trained_share)
    kept = data.sampled[chosen.rows]
    held, own = chosen.rows[kept], labels[chosen.rows[kept]]
    logits = found.slope * (chosen.logits[:, kept] - trained[:, None]) + found.other * others[:, held]
    logits = np.ascontiguousarray((logits + priors[:, None]).T)
    groups = len(np.unique(data.groups[held]))
    smoothing = measures.smoothing(groups)
    probabilities = smoothed(softmax(logits), smoothing, count)
    confidence, answers = probabilities.max(axis=1), probabilities.argmax(axis=1)
    right = answers == own
    threshold = measures.answer_threshold(confidence, right, data.answer_accuracy)
    solved = found.slope * chosen.weights
    solved[:, -1] -= found.slope * trained
    if found.other:
        solved += found.other * discriminant.weights()
    solved[:, -1] += priors
    weight, bias = basis.weights(solved)
    head = Head(
        task="classification",
        fingerprint=data.fingerprint,
        labels=names,
        scaling=scaling,
        weight=storable(weight),
        bias=bias,
        doubt=fit_abstention(threshold, logits, "classification"),
        region=region,
        smoothing=smoothing,
        measured=tellable,
    )
    scores = np.full(len(labels), np.nan, dtype=np.float32)
    scores[held] = right
    unmeasured = data.sampled & (data.folds < 0)
    report = report_of(
        CrossValidated(probabilities, held, own),
        sizes,
        names,
        groups=groups,
        unmeasured=labels[unmeasured],
        trained_share=trained_share,
    ) | {
        "strength": chosen.strength,
        "temperature": 1.0 / found.slope,
        "discriminant": found.other,
        "threshold": threshold,
    }
    return head, report, scores


@dataclass(frozen=True, slots=True)
class CrossValidated:
    """Predictions for m held-out examples."""

    probabilities: Floats  # (m, labels)
    rows: Integers  # (m,), the examples' rows in the data
    own: Integers  # (m,), the examples' labels


def report_of(
    held_out: CrossValidated,
    sizes: Integers,
    names: tuple[str, ...],
    *,
    groups: int | None = None,
    unmeasured: Integers | None = None,
    trained_share: float = 1.0,
) -> dict[str, Any]:
    """Return the report on held-out examples, whose labels are indices into `names`.

    `sizes`: number of examples of each label in all. `unmeasured`: labels (u,) of sampled examples that could
    not be held out, each the only one of its label; they count as wrong, because their label cannot be
    predicted without them. `groups`, `trained_share`: see measures.accuracy_interval.
    """
    probabilities, own = held_out.probabilities, held_out.own
    alone = np.zeros(0, dtype=np.int64) if unmeasured is None else unmeasured
    confidence, answers = probabilities.max(axis=1), probabilities.argmax(axis=1)
    right = answers == own
    # Accuracy needs two labels to tell apart.
    measured = len(np.unique(own)) > 1
    wanted = np.bincount(np.concatenate([own, alone]), minlength=len(names))
    hits = np.bincount(own[right], minlength=len(names))
    doubtful = measures.suspects(probabilities, own)
    report: dict[str, Any] = {
        "accuracy": float(right.sum() / (len(own) + len(alone))) if measured else None,
        "accuracy_interval": measures.accuracy_interval(
            right, groups=groups, unmeasured=len(alone), trained_share=trained_share
        )
        if measured
        else None,
        "balanced_accuracy": float(np.mean((hits / np.maximum(wanted, 1))[wanted > 0])) if measured else None,
        "majority_share": float(wanted.max() / wanted.sum()) if wanted.sum() else None,
        "labels_not_measured": int((np.bincount(own, minlength=len(names)) == 0).sum()),
        "per_label": _per_label(own, answers, sizes, names),
        "confusion": _confusion(own, answers, names),
        "calibration_error": measures.calibration_error(confidence, right) if measured else None,
        "suspects": _suspects(held_out, doubtful[:_MOST_SUSPECTS], names),
        "suspects_total": len(doubtful),
    }
    return report | {"warnings": _warnings(report)}


def _warnings(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return warnings for readers who look at the accuracy only."""
    if report["accuracy"] is None:
        return []
    found = []
    if report["labels_not_measured"]:
        detail = (
            f"{report['labels_not_measured']} labels have too few examples to be measured; where they should "
            "be answered counts as wrong. Send two examples of each label, or more."
        )
        found.append({"code": "labels_not_measured", "detail": detail})
    if report["accuracy_interval"][0] <= report["majority_share"]:
        detail = (
            f"The most frequent label is right in {100 * report['majority_share']:.0f} % of the examples, "
            "and these are too few, or too hard, to show that the adapter does better."
        )
        found.append({"code": "no_better_than_majority", "detail": detail})
    missed = [name for name, one in report["per_label"].items() if (one["recall"] or 0.0) < _LOW_RECALL]
    missed = [name for name in missed if report["per_label"][name]["recall"] is not None]
    if missed:
        shown = ", ".join(repr(name) for name in missed[:_MOST_NAMED]) + (
            " and others" if len(missed) > _MOST_NAMED else ""
        )
        detail = (
            f"Less than half is recognised of {shown}. Send more examples of them, or, if they are rare and "
            'matter as much as others, use "weights": "balanced".'
        )
        found.append({"code": "low_recall", "detail": detail})
    return found


def _priors(labels: Integers, count: int, balanced: bool) -> Floats:
    """Return log frequencies (count,) of labels (m,), drawn to equal ones as far as chance explains them.

    This is the positive part of James and Stein's estimate (1961): counts keep the share of their differences
    that equally frequent labels would not show. A few pseudo-examples of each label are added.
    """
    sizes = np.bincount(labels, minlength=count).astype(np.float64)
    equal = max(sizes.sum(), 1.0) / count
    differing = float(((sizes - equal) ** 2).sum() / equal)
    share = 0.0 if balanced or not differing else max(0.0, 1.0 - (count - 1) / differing)
    result: Floats = np.log(equal + share * (sizes - equal) + _PRIOR_EXAMPLES).astype(np.float32)
    return result - np.float32(np.log(np.exp(result).sum()))


def _held_out(plan: FitBudget, folds: Integers) -> int:
    """Return the number of folds, from the first one, that the search or the report holds out."""
    return min(max(plan.searched, plan.held_out), int(folds.max(initial=-1)) + 1)


def _share(labels: Integers, sizes: Integers, every: int) -> Integers:
    """Return the ascending rows of every `every`-th example of each label, at least two per label."""
    order = np.argsort(labels, kind="stable")
    places = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(order[(places % every == 0) | (places < 2)])


def _training(labels: Integers, folds: Integers, sizes: Integers) -> Floats:
    """Return row weights (k, n) for the training of each fold.

    A label is rarer without the examples of the fold. If it has few, held-out examples would look much less
    likely than they are, so the weights of the remaining ones are raised to make up for them.
    """
    weights = np.empty((int(folds.max()) + 1, len(labels)), dtype=np.float32)
    for fold, row in enumerate(weights):
        trained = folds != fold
        left = np.bincount(labels[trained], minlength=len(sizes))
        row[:] = (sizes / np.maximum(left, 1)).astype(np.float32)[labels]
        row[~trained] = 0.0
    return weights


def _per_label(
    own: Integers, answers: Integers, sizes: Integers, names: tuple[str, ...]
) -> dict[str, dict[str, float | int | None]]:
    """Return precision, recall and F1 on held-out examples, None if undefined; support is of all examples."""
    count = len(names)
    hits = np.bincount(own[own == answers], minlength=count).tolist()
    given = np.bincount(answers, minlength=count).tolist()
    held = np.bincount(own, minlength=count).tolist()
    return {
        name: {
            "precision": hit / answered if answered else None,
            "recall": hit / there if there else None,
            "f1": 2.0 * hit / (answered + there) if there else None,
            "support": support,
        }
        for name, hit, answered, there, support in zip(names, hits, given, held, sizes.tolist(), strict=True)
    }


def _confusion(own: Integers, answers: Integers, names: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """Return label -> label answered -> examples: all right answers and the most frequent mistakes."""
    pairs, counts = np.unique(own * len(names) + answers, return_counts=True)
    mistakes = np.flatnonzero(pairs // len(names) != pairs % len(names))
    left_out = set(mistakes[np.argsort(-counts[mistakes], kind="stable")][_MOST_CONFUSIONS:].tolist())
    confusion: dict[str, dict[str, int]] = {}
    for place, (pair, number) in enumerate(zip(pairs.tolist(), counts.tolist(), strict=True)):
        if place not in left_out:
            confusion.setdefault(names[pair // len(names)], {})[names[pair % len(names)]] = number
    return confusion


def _suspects(
    held_out: CrossValidated, doubtful: Sequence[tuple[int, int]], names: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Return doubtful labels by row, with the probability of the label that the example looks like."""
    return [
        {
            "index": int(held_out.rows[place]),
            "label": names[held_out.own[place]],
            "looks_like": names[other],
            "confidence": float(held_out.probabilities[place, other]),
        }
        for place, other in doubtful
    ]
