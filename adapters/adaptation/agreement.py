"""Whether a version agrees with new examples as often as it claims to be right.

The test may be looked at after every append. It bets against the version's claims; while they hold, the
stake is a supermartingale, and the chance that it ever grows E-fold is at most 1 / E (Ville's inequality;
Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from adapters.examples.target import Target, Task
from adapters.heads.head import Head
from adapters.storage.formats import Evidence
from models.arrays import Doubles, Floats

# Shares of wrong labels that are bet on, each with the same part of the stake.
_WRONG_SHARES = np.array([0.2, 0.4, 0.7])
# This share of the stake is bet at once. The rest is bet later, to find wrong examples that begin late.
_AT_ONCE = 0.8
# The accuracy over all labels counts as so many examples of each.
_PRIOR_EXAMPLES = 2.0
# Bounds of a claim: none is so high that one mistake decides.
_LOWEST, _HIGHEST = 0.02, 0.97
# For a regression, the largest likelihood ratio that a single error may have.
_MOST_LIKELY = 4.0


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a version says of m examples that it has not learned.

    agreed: float32 (m,), 1 or 0 for right or wrong; for multilabel the F1 of the labels given; for regression
    1 less half of how many times likelier the error would be if the target were another example's.
    expected: float32 (m,), the least mean of that which it claims.
    """

    agreed: Floats
    expected: Floats


def ask(
    task: Task, head: Head, evidence: Evidence, embeddings: Floats, targets: Sequence[Target]
) -> Agreement | None:
    """What the version with this head and evidence says of examples with embeddings float32 (m, dim).

    Its claim is what it was out of fold, less one standard error. For classification that is its confidence
    in the input, moved by as much as the label's recall differs from the accuracy: hard inputs, or examples
    of a hard label alone, are no reason for alarm. None where it was not measured and claims nothing.
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
        answer = np.array(head.labels, object)[predictions.probabilities.argmax(axis=1)]
        agreed = answer == np.array(targets, object)
        confidence = np.clip(predictions.confidence.astype(np.float64), _LOWEST, _HIGHEST)
        expected = _sigmoid(_logit(confidence) + _shift(evidence, scores, targets))
    expected = np.clip(expected, _LOWEST, _HIGHEST)
    return Agreement(agreed.astype(np.float32), expected.astype(np.float32))


def against(agreed: Floats, expected: Floats, asked: NDArray[np.int64]) -> tuple[float, int]:
    """How many times a stake has grown that was bet on too little agreement, and since when most of it did.

    agreed, expected: (m,), m > 0, see Agreement. asked: int64 (m,), numbers that grow with time, the same for
    examples asked together. A share w of wrong labels makes (1 - w) p of a claim p, and that is the bet.
    """
    found, claims = agreed.astype(np.float64), expected.astype(np.float64)
    growth = np.log1p(_WRONG_SHARES[:, None] * (claims - found) / (1.0 - claims))
    times, place = np.unique(asked, return_inverse=True)
    steps = np.stack([np.bincount(place, weights=row, minlength=len(times)) for row in growth])
    since = np.cumsum(steps[:, ::-1], axis=1)[:, ::-1]
    # The bet that starts at each time: the waiting part is split as 1 / (1 2), 1 / (2 3), …
    later = np.arange(1.0, len(times))
    parts = np.append(_AT_ONCE, (1.0 - _AT_ONCE) / (later * (later + 1.0)))
    grown = np.exp(np.minimum(since, 700.0)).mean(axis=0)
    return float(grown @ parts + 1.0 - parts.sum()), int(times[grown.argmax()])


def _likelier(errors: Doubles, usual: Doubles, targets: Doubles) -> Doubles:
    """How many times likelier squared errors are if the targets are another example's than if they are right.

    usual: squared errors left out, whose mean is the variance of right targets' errors. That of wrong ones is
    the variance of the targets more than that of the predictions. Both are taken as normal; bounded, so that
    no single error decides.
    """
    right = max(float(usual.mean()), 1e-300)
    wrong = max(2.0 * float(targets.var()) - right, 1.05 * right)
    growth = 0.5 * (errors / right - errors / wrong + np.log(right / wrong))
    likelier: Doubles = np.exp(np.minimum(growth, np.log(_MOST_LIKELY)))
    return likelier


def _overlap(answer: set[str], target: Target) -> float:
    """F1 of the labels given; 1 where none is given and none is there."""
    own = set(cast("tuple[str, ...]", target))
    return 2.0 * len(answer & own) / (len(answer) + len(own)) if answer or own else 1.0


def _shift(evidence: Evidence, scores: Doubles, targets: Sequence[Target]) -> Doubles:
    """How much less often, in logits, each target is answered rightly than all are; lowered by its error."""
    own = np.array([str(evidence.targets[row]) for row in np.flatnonzero(evidence.measured)])
    chance = 1.0 / len(set(evidence.targets))
    accuracy = _share(scores.sum(), len(scores), chance)
    names, place = np.unique(own, return_inverse=True)
    counts = np.bincount(place, minlength=len(names))
    recalls = _share(np.bincount(place, weights=scores, minlength=len(names)), counts, accuracy)
    claims = _logit(recalls) - _standard_error(counts + _PRIOR_EXAMPLES, _logit(recalls))
    # A label that was never held out is as good as all are, for all that is known.
    unknown = _logit(accuracy) - _standard_error(_PRIOR_EXAMPLES, _logit(accuracy))
    known = dict(zip(names.tolist(), claims.tolist(), strict=True))
    shifted: Doubles = np.array([known.get(str(target), float(unknown)) for target in targets])
    shifted -= _logit(accuracy)
    return shifted


def _share(right: Any, count: Any, prior: Any) -> Any:
    """The share of right answers, with a few more that are right as often as the prior says."""
    share = (right + _PRIOR_EXAMPLES * prior) / (count + _PRIOR_EXAMPLES)
    return np.clip(share, _LOWEST, _HIGHEST)


def _standard_error(count: Any, logit: Any) -> Any:
    """Of the logit of a share among so many."""
    share = _sigmoid(logit)
    return 1.0 / np.sqrt(count * share * (1.0 - share))


def _logit(share: Any) -> Any:
    return np.log(share / (1.0 - share))


def _sigmoid(logit: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-logit))
