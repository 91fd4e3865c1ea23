"""Whether a new version may become `live`: not one that is measurably worse than what answers now."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np

from adapters.example import Target, Task
from adapters.segments import Evidence

Promote = Literal["if_better", "always", "never"]

SIGNIFICANCE = 0.05


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to promote, and why.

    compared: examples that both versions have, unchanged and scored. score and live_score: means over them of
    the new and of the live version: accuracy, exact matches for multilabel, minus the mean squared error for
    regression; None where nothing was compared. p_value: chance of so many losses if the new version were as
    good.
    """

    promote: bool
    reason: str
    compared: int = 0
    score: float | None = None
    live_score: float | None = None
    p_value: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The decision as it stands in a version's report."""
        return {
            "promoted": self.promote,
            "reason": self.reason,
            "compared": self.compared,
            "score": self.score,
            "live_score": self.live_score,
            "p_value": self.p_value,
        }


def decide(wanted: Promote, task: Task, new: Evidence, live: Evidence | None) -> Decision:
    """The decision on a new version, given the live one's evidence (None if nothing is live or it has none).

    "if_better" withholds only what has the lower mean and is worse at p < 0.05 in a one-sided exact McNemar
    test (classification, multilabel) or sign test (regression) of the out-of-fold scores of unchanged
    examples. A label that was added, or an example that was removed or corrected, promotes: then the live
    version answers another question.
    """
    if wanted == "never":
        return Decision(False, "never")
    if live is None:
        return Decision(True, "first" if wanted == "if_better" else "always")
    before = {example: place for place, example in enumerate(live.ids)}
    pairs = [(place, before[example]) for place, example in enumerate(new.ids) if example in before]
    changed = _changed(task, new, live, pairs)
    same = [(here, there) for here, there in pairs if _unchanged(new, live, here, there)]
    compared = _compare(new, live, same)
    if wanted == "always":
        return Decision(True, "always", **compared)
    if changed:
        return Decision(True, changed, **compared)
    if not compared["compared"]:
        return Decision(True, "not_comparable", **compared)
    # The means too: a regression may lose a little on most examples and win much on a few.
    worse = compared["p_value"] < SIGNIFICANCE and compared["score"] < compared["live_score"]
    return Decision(not worse, "worse" if worse else "not_worse", **compared)


def decide_late(wanted: Promote, task: Task, new: Evidence, live: Evidence | None) -> Decision:
    """The decision on a fine-tune, which costs more to serve than a head, and took long to train.

    "if_better" asks for a higher mean. What was added or corrected meanwhile does not speak for it: only
    examples that both know alike are compared, and a label that the live version alone knows withholds it.
    """
    if live is None:
        return decide(wanted, task, new, live)
    if wanted == "if_better" and labels_of(task, live.targets) - labels_of(task, new.targets):
        return Decision(False, "label_missing")
    place = {example: there for there, example in enumerate(live.ids)}
    alike = [
        place[example]
        for here, example in enumerate(new.ids)
        if example in place and _unchanged(new, live, here, place[example])
    ]
    known = Evidence(
        tuple(live.ids[there] for there in alike),
        tuple(live.digests[there] for there in alike),
        tuple(live.targets[there] for there in alike),
        live.scores[alike],
    )
    decision = decide("always" if wanted == "if_better" else wanted, task, new, known)
    if wanted != "if_better":
        return decision
    if decision.score is None or decision.live_score is None:
        return replace(decision, promote=False, reason="not_comparable")
    better = decision.score > decision.live_score
    return replace(decision, promote=better, reason="better" if better else "not_better")


def loss_p_value(wins: int, losses: int) -> float:
    """Chance of at least so many losses in wins + losses fair tosses: McNemar's and the sign test, one-sided.

    McNemar, Psychometrika 12 (1947); exact form as in Fagerland, Lydersen and Laake, BMC Med. Res. Methodol.
    13 (2013).
    """
    tosses = wins + losses
    if tosses == 0:
        return 1.0
    if tosses > 2_000:
        # The normal approximation with continuity correction; at this size it agrees to three digits.
        z = (losses - 0.5 - tosses / 2) / math.sqrt(tosses / 4)
        return 0.5 * math.erfc(z / math.sqrt(2))
    tail: int = sum(math.comb(tosses, count) for count in range(losses, tosses + 1))
    return tail / (1 << tosses)


def labels_of(task: Task, targets: Sequence[Target]) -> set[str]:
    """The labels that occur in targets; none for regression."""
    if task == "regression":
        return set()
    if task == "classification":
        return set(cast("Sequence[str]", targets))
    return {label for target in targets for label in cast("tuple[str, ...]", target)}


def _changed(task: Task, new: Evidence, live: Evidence, pairs: Sequence[tuple[int, int]]) -> str | None:
    if labels_of(task, new.targets) - labels_of(task, live.targets):
        return "label_added"
    if len(pairs) < len(live.ids):
        return "example_removed"
    if any(not _unchanged(new, live, here, there) for here, there in pairs):
        return "example_corrected"
    return None


def _unchanged(new: Evidence, live: Evidence, here: int, there: int) -> bool:
    return new.targets[here] == live.targets[there] and new.digests[here] == live.digests[there]


def _compare(new: Evidence, live: Evidence, pairs: Sequence[tuple[int, int]]) -> Mapping[str, Any]:
    here = np.array([pair[0] for pair in pairs], np.int64)
    there = np.array([pair[1] for pair in pairs], np.int64)
    ours, theirs = new.scores[here].astype(np.float64), live.scores[there].astype(np.float64)
    scored = np.isfinite(ours) & np.isfinite(theirs)
    ours, theirs = ours[scored], theirs[scored]
    if ours.size == 0:
        return {"compared": 0}
    return {
        "compared": int(ours.size),
        "score": float(ours.mean()),
        "live_score": float(theirs.mean()),
        "p_value": loss_p_value(int((ours > theirs).sum()), int((ours < theirs).sum())),
    }
