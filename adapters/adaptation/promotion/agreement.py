"""Tests whether a version agrees with new examples as often as it claims to be right.

The test may be repeated after every append. It bets against the version's claims: while they hold, the stake
is a supermartingale, and the probability that it ever grows E-fold is at most 1 / E (Ville's inequality;
Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from adapters.examples.target import Target, Task
from adapters.heads.answers import answers_of, nothing
from adapters.heads.head import Head
from adapters.storage.formats import Evidence
from models.arrays import Doubles, Floats, Integers

# Shares of wrong labels that are bet on, each with an equal part of the stake.
_WRONG_SHARES = np.array([0.2, 0.4, 0.7])
# Share of the stake that is bet at once. The rest is bet later, to find wrong labels that begin late.
_AT_ONCE = 0.8
# The accuracy over all labels counts as this many examples of each label.
_PRIOR_EXAMPLES = 2.0
# Bounds of a claim, so that a single mistake never decides.
_LOWEST, _HIGHEST = 0.02, 0.97
# Largest likelihood ratio of a single error of a regression.
_MOST_LIKELY = 4.0


@dataclass(frozen=True, slots=True)
class Agreement:
    """The predictions of a version for m examples that it has not learned, compared with their targets.

    `agreed`: float32 (m,), 1 for right, 0 for wrong; for multilabel the F1 of the labels given; for
    regression 1 - r / 2, where r is how many times likelier the error would be if the target were another
    example's, relative to the mean of r out of fold. `expected`: float32 (m,), the lowest mean of `agreed`
    that the version claims.
    """

    agreed: Floats
    expected: Floats


def ask(
    task: Task, head: Head, evidence: Evidence, embeddings: Floats, targets: Sequence[Target]
) -> Agreement | None:
    """Compare the predictions of the version with this head and evidence with the targets of new examples.

    `embeddings`: float32 (m, dim). The claim is the out-of-fold score less one standard error. For
    classification it is the confidence in the input, shifted by how far the label's recall differs from the
    accuracy, so that hard inputs, or examples of one hard label only, raise no alarm. Returns None if the
    version was not measured and so claims nothing.
    """
    scores = evidence.scores[evidence.measured].astype(np.float64)
    if not head.measured or not len(scores):
        return None
    predictions = head.predict(embeddings)
    if task == "regression":
        assert predictions.values is not None
        errors = (predictions.values - np.array(targets, np.float64)) ** 2
        own = np.array([evidence.targets[row] for row in np.flatnonzero(evidence.measured)], np.float64)
        usual = _likelier(-scores, -scores, own)
        agreed = 1.0 - _likelier(errors, -scores, own) / (2.0 * usual.mean())
        error = usual.std() / (usual.mean() * np.sqrt(len(usual)))
        expected = np.full(len(agreed), 0.5 * (1.0 - error))
    elif task == "multilabel":
        assert predictions.assigned is not None
        answers = [{head.labels[label] for label in np.flatnonzero(row)} for row in predictions.assigned]
        agreed = np.array([_overlap(answer, target) for answer, target in zip(answers, targets, strict=True)])
        error = scores.std() / np.sqrt(len(scores))
        expected = np.full(len(agreed), scores.mean() - error)
    else:
        # Scores, too, are of the most probable label: costs change nothing that was learned.
        answer = np.array(head.labels, object)[answers_of(predictions.probabilities, nothing())]
        agreed = answer == np.array(targets, object)
        confidence = np.clip(predictions.probabilities.max(axis=1).astype(np.float64), _LOWEST, _HIGHEST)
        expected = _sigmoid(_logit(confidence) + _shift(evidence, scores, targets))
    expected = np.clip(expected, _LOWEST, _HIGHEST)
    return Agreement(agreed.astype(np.float32), expected.astype(np.float32))


def against(agreed: Floats, expected: Floats, asked: Integers) -> tuple[float, int]:
    """Return how many times a stake on too little agreement has grown, and when most of the growth began.

    `agreed`, `expected`: (m,), m > 0, see Agreement. `asked`: int64 (m,), numbers that grow with time, equal
    for examples asked about together. A share w of wrong labels turns a claim p into (1 - w) p, and that is
    the bet.
    """
    found, claims = agreed.astype(np.float64), expected.astype(np.float64)
    growth = np.log1p(_WRONG_SHARES[:, None] * (claims - found) / (1.0 - claims))
    times, place = np.unique(asked, return_inverse=True)
    steps = np.stack([np.bincount(place, weights=row, minlength=len(times)) for row in growth])
    since = np.cumsum(steps[:, ::-1], axis=1)[:, ::-1]
    # Stake of the bet that starts at each time: the waiting part is split as 1 / (1 2), 1 / (2 3), …
    later = np.arange(1.0, len(times))
    parts = np.append(_AT_ONCE, (1.0 - _AT_ONCE) / (later * (later + 1.0)))
    grown = np.exp(np.minimum(since, 700.0)).mean(axis=0)
    return float(grown @ parts + 1.0 - parts.sum()), int(times[grown.argmax()])


def _likelier(errors: Doubles, usual: Doubles, targets: Doubles) -> Doubles:
    """Return how many times likelier squared errors are with another example's target than with their own.

    `usual`: left-out squared errors, whose mean is the variance of errors with right targets. With wrong
    targets, the variance of the targets is added to that of the predictions. Both are taken as normal. The
    ratio is bounded, so that no single error decides.
    """
    right = max(float(usual.mean()), 1e-300)
    wrong = max(2.0 * float(targets.var()) - right, 1.05 * right)
    growth = 0.5 * (errors / right - errors / wrong + np.log(right / wrong))
    likelier: Doubles = np.exp(np.minimum(growth, np.log(_MOST_LIKELY)))
    return likelier


def _overlap(answer: set[str], target: Target) -> float:
    """Return the F1 of the labels given; 1 if none is given and none is right."""
    own = set(cast("tuple[str, ...]", target))
    return 2.0 * len(answer & own) / (len(answer) + len(own)) if answer or own else 1.0


def _shift(evidence: Evidence, scores: Doubles, targets: Sequence[Target]) -> Doubles:
    """Return each target's recall, less its standard error, minus the accuracy over all labels, in logits."""
    own = np.array([str(evidence.targets[row]) for row in np.flatnonzero(evidence.measured)])
    chance = 1.0 / len(set(evidence.targets))
    accuracy = _share(scores.sum(), len(scores), chance)
    names, place = np.unique(own, return_inverse=True)
    counts = np.bincount(place, minlength=len(names))
    recalls = _share(np.bincount(place, weights=scores, minlength=len(names)), counts, accuracy)
    claims = _logit(recalls) - _standard_error(counts + _PRIOR_EXAMPLES, _logit(recalls))
    # A label that was never held out is assumed to be as good as all labels are on average.
    unknown = _logit(accuracy) - _standard_error(_PRIOR_EXAMPLES, _logit(accuracy))
    known = dict(zip(names.tolist(), claims.tolist(), strict=True))
    shifted: Doubles = np.array([known.get(str(target), float(unknown)) for target in targets])
    shifted -= _logit(accuracy)
    return shifted


def _share(right: Any, count: Any, prior: Any) -> Any:
    """Return the share of right answers, smoothed towards the prior by _PRIOR_EXAMPLES more answers."""
    share = (right + _PRIOR_EXAMPLES * prior) / (count + _PRIOR_EXAMPLES)
    return np.clip(share, _LOWEST, _HIGHEST)


def _standard_error(count: Any, logit: Any) -> Any:
    """Return the standard error of the logit of a share among `count` answers."""
    share = _sigmoid(logit)
    return 1.0 / np.sqrt(count * share * (1.0 - share))


def _logit(share: Any) -> Any:
    return np.log(share / (1.0 - share))


def _sigmoid(logit: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-logit))
