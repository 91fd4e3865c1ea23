"""Fits and measures a head that gives every input one label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.heads.abstention import fit_abstention
from adapters.heads.answers import costs_of
from adapters.heads.head import Head, directions_for, smoothed, softmax, storable
from adapters.heads.novelty import fit_region
from adapters.heads.scaling import Scaling, scaling_of
from adapters.probe.budget import FitBudget
from adapters.probe.calibration import measures, slopes
from adapters.probe.calibration.judgement import judge
from adapters.probe.calibration.report import CrossValidated, report_of
from adapters.probe.cross_validation import MIDDLE_STRENGTH, CrossValidation, FitInputs, strength_penalty
from adapters.probe.label_names import LabelNames, NameLogits, name_logits, unseen_offset
from adapters.probe.solvers.basis import Basis, basis_of
from adapters.probe.solvers.lda import Discriminant
from adapters.probe.solvers.logistic import Softmax
from adapters.probe.stack import Judges, Stack, held_out_logits, judges_of
from models.arrays import Floats, Integers

# Pseudo-examples that are added to each label's count.
_PRIOR_EXAMPLES = 20.0
# Held-out answers that the names of labels count as, from other data, where there are fewer.
_NAMES_ANSWERS = 20


def fit_classification(
    data: FitInputs, labels: Integers, names: tuple[str, ...], label_names: LabelNames = LabelNames()
) -> tuple[Head, dict[str, Any], Floats]:
    """Return head, report and scores (n,), as in FittedProbe. `labels`: (n,), indices into `names`.

    Labels without an example must have a name in `label_names`.
    """
    seen, own = np.unique(labels, return_inverse=True)
    count, dim = len(seen), data.embeddings.shape[1]
    region = fit_region(data.embeddings, own, data.folds, directions_for(count, dim)) if count > 1 else None
    blank = Scaling(label_names.transform, np.zeros(dim, np.float32), 1.0)
    scaling = scaling_of(data.embeddings) if count else blank
    features = scaling.apply(data.embeddings, into=data.embeddings)
    named = name_logits(label_names, names, scaling, len(own)) if label_names.directions else None
    hints = None if named is None else named.of(features)[seen]
    judges = judges_of(data, own, hints, None if named is None else named.known[seen])
    priors = _priors(own[data.sampled], count, data.balanced)
    folds = int(data.folds.max(initial=-1)) + 1
    # A held-out example is predicted without the other examples of its fold.
    trained_share = 1.0 - 1.0 / folds if judges.tellable and folds else 1.0
    usual = slopes.usual_spread(max(count, 2), trained_share * len(own) / max(count, 1))
    learned = _learn(data, features, judges, priors, usual)
    held = learned.stack
    found = slopes.grown(held.blend(priors, usual), trained_share)
    logits = held_out_logits(held, found, priors, usual, data.groups, trained_share)
    weight, bias = learned.weights(found, priors)
    if named is not None:
        unseen = _offset_of_unseen(named, seen, found.named, priors, logits, held)
        everything = np.float32(found.named) * named.of(features[held.rows]) + unseen
        everything[seen] = logits
        logits = everything
        weights, biases = (
            np.float32(found.named) * named.weight,
            np.float32(found.named) * named.bias + unseen,
        )
        weights[seen] += weight
        biases[seen] += bias - unseen
        weight, bias = weights, biases
    logits = np.ascontiguousarray(logits.T)
    groups = len(np.unique(data.groups[held.rows]))
    smoothing = measures.smoothing(groups if named is None else max(groups, _NAMES_ANSWERS))
    probabilities = smoothed(softmax(logits), smoothing, len(names))
    costs = costs_of(data.costs, names)
    judged = judge(probabilities, labels[held.rows], costs, data.answer_accuracy)
    head = Head(
        task="classification",
        fingerprint=data.fingerprint,
        labels=names,
        scaling=scaling,
        weight=storable(weight),
        bias=bias,
        doubt=fit_abstention(judged.threshold, logits, "classification"),
        region=region,
        costs=costs,
        alarms=judged.alarms,
        smoothing=smoothing,
        # Where there is nothing to measure, names are trusted as far as they could be on other data.
        measured=judges.tellable or named is not None,
    )
    scores = np.full(len(labels), np.nan, dtype=np.float32)
    scores[held.rows] = judged.likeliest_right
    unmeasured = data.sampled & (data.folds < 0)
    unmeasured[judges.alone] = False
    report = report_of(
        CrossValidated(probabilities, held.rows, labels[held.rows], judged),
        np.bincount(labels, minlength=len(names)),
        names,
        groups=groups,
        unmeasured=labels[unmeasured],
        trained_share=trained_share,
    ) | {
        "strength": learned.strength,
        "temperature": 1.0 / found.slope,
        "discriminant": found.other,
        "names": found.named,
        "threshold": judged.threshold,
    }
    return head, report, scores


@dataclass(frozen=True, slots=True)
class _Learned:
    """What the examples taught, before the members are blended."""

    strength: float
    stack: Stack
    basis: Basis | None  # None if there are no two labels to tell apart
    first: Floats  # (labels, p + 1)
    second: Floats  # (labels, p + 1)
    dim: int

    def weights(self, found: slopes.Blend, priors: Floats) -> tuple[Floats, Floats]:
        """Return the blended weights (labels, dim) and biases (labels,), without the names."""
        if self.basis is None:
            return np.zeros((len(priors), self.dim), dtype=np.float32), priors.copy()
        solved = found.slope * self.first
        if found.other:
            solved += found.other * self.second
        solved[:, -1] += priors
        return self.basis.weights(solved)


def _learn(data: FitInputs, features: Floats, judges: Judges, priors: Floats, usual: float) -> _Learned:
    """Fit the logistic regression and the discriminant."""
    own, count, dim = judges.own, len(priors), features.shape[1]
    if count < 2:
        nothing = np.zeros((count, 0), dtype=np.float32)
        held = judges.stack(np.zeros(0, dtype=np.int64), nothing, nothing)
        return _Learned(MIDDLE_STRENGTH, held, None, nothing, nothing, dim)
    basis = basis_of(features, data.plan.columns)
    sizes = np.bincount(own, minlength=count)
    discriminant = Discriminant(basis.design.rows[:, :-1], own, count, data.folds, dim)
    measured_folds = range(_held_out(data.plan, data.folds))
    others = np.zeros((count, len(own)), dtype=np.float32)
    others[:, (data.folds >= 0) & (data.folds < len(measured_folds))] = discriminant.held_out(measured_folds)
    # Label frequencies in training are subtracted from the logits, and shrunk ones are added instead.
    trained = np.log(sizes / sizes.sum()).astype(np.float32)

    def stack(logits: Floats, rows: Integers) -> Stack:
        return judges.stack(rows, logits - trained[:, None], others[:, rows])

    def loss(logits: Floats, rows: Integers, strength: float) -> tuple[float, float]:
        found = stack(logits, rows).blend(priors, usual)
        return found.loss + strength_penalty(strength, len(rows)), found.stretch

    chosen = CrossValidation(
        basis.design,
        Softmax(own),
        count,
        data.folds,
        _training(own, data.folds, sizes),
        data.memory_bytes,
    ).choose(data.plan, _share(own, sizes, data.plan.share), loss)
    first = chosen.weights.copy()
    first[:, -1] -= trained
    held = stack(chosen.logits, chosen.rows)
    return _Learned(chosen.strength, held, basis, first, discriminant.weights(), dim)


def _offset_of_unseen(
    named: NameLogits, seen: Integers, share: float, priors: Floats, logits: Floats, held: Stack
) -> float:
    """Return what is added to the names' logits of labels without examples. `share`: weight of names.

    `logits`: (labels, m), held out, of the labels in `seen`.
    """
    usual = float(np.log(np.exp(priors).mean())) if len(priors) else 0.0
    if held.hints is None or not len(held.rows) or len(seen) == len(named.known):
        return usual
    hints = np.float32(share) * held.hints + np.float32(usual)
    return usual + unseen_offset(logits, hints, held.own, named.known[seen])


def _priors(labels: Integers, count: int, balanced: bool) -> Floats:
    """Return log frequencies (count,) of labels (m,), drawn to equal ones as far as chance explains them.

    This is the positive part of James and Stein's estimate (1961): counts keep the share of their differences
    that equally frequent labels would not show. A few pseudo-examples of each label are added.
    """
    if not count:
        return np.zeros(0, dtype=np.float32)
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
