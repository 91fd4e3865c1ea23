"""Whether a new version may become `live`: unless it is measurably worse, or learned what looks wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from adapters.adaptation.agreement import Agreement, against
from adapters.examples.target import Target, Task, label_set
from adapters.registry.records import AdapterRecord
from adapters.storage.formats import Evidence, History
from models.arrays import Floats

Promote = Literal["if_better", "always", "never"]
Pairs = Sequence[tuple[int, int]]
"""Rows of an example in the new version's evidence and in the live one's."""

# An adapter is taught many times. At these levels one of twenty that are taught twenty times with right
# examples is ever withheld; docs/decisions.md, "Promotion", has what was measured.
_LEVEL = 0.0004
_MOST_DOUBT = 25.0
# A regression is worse only if its mean squared error is this many times larger: errors move together.
_LARGER_ERROR = 1.25
# Of one look at a fine-tune, which has one.
SIGNIFICANCE = 0.05


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two versions on the examples that both were measured on, unchanged.

    compared: how many. score and other: means over them of the new version's scores and of the other's:
    accuracy, the F1 of an example's labels for multilabel, minus the mean squared error for regression; None
    where nothing was compared. p_value: chance of so many losses if the new version were as good.
    """

    compared: int = 0
    score: float | None = None
    other: float | None = None
    p_value: float | None = None

    def worse(self, level: float) -> bool:
        """Whether the new version is worse, by its mean too: few large wins may outweigh many losses."""
        if self.score is None or self.other is None or self.p_value is None:
            return False
        allowed = self.other * (_LARGER_ERROR if self.other < 0.0 else 1.0)
        return self.p_value < level and self.score < allowed


@dataclass(frozen=True, slots=True)
class Heard:
    """What versions that were live said of new examples before these were learned.

    examples: how many they were asked about. agreed: the share they were right about, and expected the share
    that they claimed (means of agreement.Agreement). doubt: how many times a stake on wrong examples has
    grown; above 25 the claim is refuted. since: the version that was live when that began.
    """

    examples: int
    agreed: float
    expected: float
    doubt: float
    since: int


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to promote, and why.

    with_live, with_best: the new version beside the live one and beside the best one so far, whose number is
    best. worse_labels: whose recall has sunk. heard: None where no version was asked about new examples.
    fallback: the version that is to be live if this one is withheld; None leaves the live one.
    """

    promote: bool
    reason: str
    with_live: Comparison = Comparison()
    with_best: Comparison = Comparison()
    best: int | None = None
    worse_labels: tuple[str, ...] = ()
    heard: Heard | None = None
    fallback: int | None = None

    @property
    def proved(self) -> bool:
        """Whether it was made live by its comparisons, so that they go on from there.

        A person who makes a version live that was withheld, or asks for `always`, has judged what it learned.
        """
        return self.promote and self.reason not in ("first", "always")

    def to_json(self) -> dict[str, Any]:
        """The decision as it stands in a version's report."""
        live, best, heard = self.with_live, self.with_best, self.heard
        return {
            "promoted": self.promote,
            "reason": self.reason,
            "compared": live.compared,
            "score": live.score,
            "live_score": live.other,
            "p_value": live.p_value,
            "best": None
            if self.best is None or not best.compared
            else {
                "version": self.best,
                "compared": best.compared,
                "score": best.score,
                "best_score": best.other,
                "p_value": best.p_value,
            },
            "worse_labels": list(self.worse_labels),
            "agreement": None
            if heard is None
            else {
                "examples": heard.examples,
                "agreed": heard.agreed,
                "expected": heard.expected,
                "doubt": heard.doubt,
                "since_version": heard.since,
            },
        }


def as_asked(wanted: Promote, asked: datetime, adapter: AdapterRecord) -> Promote:
    """What a job of that time may promote: an `always` from before a person went back gives way to that."""
    went_back = (adapter.rolled_back_at, adapter.restored_at)
    overtaken = any(at is not None and asked <= at for at in went_back)
    return "if_better" if overtaken and wanted == "always" else wanted


def decide(
    wanted: Promote, task: Task, new: Evidence, live: Evidence | None, *, held: bool = False
) -> Decision:
    """The decision on a new version, given the live one's evidence (None if nothing is live or it has none).

    held: a person has rolled back to the live version; nothing but "always" goes past that.

    new: with its history, see remember. "if_better" promotes unless one of these is so. What was learned
    since disagrees with what the versions before claimed. On unchanged examples the new version is measurably
    worse than the live one or the best one so far, or worse on a label (one-sided exact McNemar test; sign
    test for regression). Nothing can be compared, the live version was measured, and the new one is on less
    than half of its labels. What was added, removed or corrected meanwhile changes none of that.
    """
    if live is None:
        if held and wanted == "if_better":
            return Decision(False, "rolled_back")
        return Decision(wanted != "never", "first" if wanted == "if_better" else wanted)
    pairs = _pairs(new, live)
    here, there = _comparable(new, live, pairs)
    ours, theirs = new.scores[here], live.scores[there]
    history = new.history
    found = Decision(
        wanted == "always",
        wanted,
        with_live=_compare(ours, theirs),
        with_best=Comparison() if history is None else _with_best(new, history),
        best=None if history is None else history.best,
        worse_labels=_worse_labels(task, [new.targets[row] for row in here], ours, theirs),
        heard=None if history is None else _heard(new, history),
    )
    if wanted != "if_better":
        return found
    if held:
        return replace(found, reason="rolled_back")
    if found.heard is not None and found.heard.doubt > _MOST_DOUBT:
        return replace(found, reason="disagrees", fallback=found.heard.since)
    if found.with_live.worse(_LEVEL) or found.with_best.worse(_LEVEL):
        return replace(found, reason="worse")
    if found.worse_labels:
        return replace(found, reason="worse_labels")
    if not len(ours) and _mostly_measured(task, live) and not _mostly_measured(task, new):
        return replace(found, reason="not_measured")
    alike = "not_worse" if len(ours) else "not_comparable"
    return replace(found, promote=True, reason=_changed(task, new, live, pairs) or alike)


def best_of(live: Evidence, number: int) -> tuple[int, Evidence]:
    """The best version so far, and what is known of it; number: of the live one.

    The live one, unless the best one before it is better on what both were measured on. It is asked about new
    examples, for a version that has learned wrong ones claims less.
    """
    before = live.history
    if before is not None:
        both = np.isfinite(before.best_scores) & live.measured
        if both.any() and before.best_scores[both].mean() > live.scores[both].mean():
            return before.best, replace(live, scores=before.best_scores)
    return number, live


def unlearned(task: Task, new: Evidence, live: Evidence) -> list[int]:
    """Rows of new evidence with inputs that are not in the live one's, and labels that it was measured on.

    live: of the version that is asked, see best_of. Only what was sampled: examples that were chosen for
    being wrong would speak against every version. One for each input.
    """
    known = label_set(task, [live.targets[row] for row in np.flatnonzero(live.measured)])
    seen = set(live.digests)
    rows = []
    for row, (digest, target) in enumerate(zip(new.digests, new.targets, strict=True)):
        if digest in seen or (new.sampled and not new.sampled[row]):
            continue
        if label_set(task, (target,)) <= known:
            seen.add(digest)
            rows.append(row)
    return rows


def remember(
    new: Evidence, live: Evidence, number: int, rows: Sequence[int], said: Agreement | None
) -> Evidence:
    """The new evidence with its history: the live one's, and what was said of those rows while it was live.

    number: of the live version. What is known of an example with another target or input does not count.
    """
    count = len(new.ids)
    agreed, expected = np.full(count, np.nan, np.float32), np.full(count, np.nan, np.float32)
    asked, scores = np.zeros(count, np.int64), np.full(count, np.nan, np.float32)
    here, there = _columns([pair for pair in _pairs(new, live) if _unchanged(new, live, *pair)])
    if (before := live.history) is not None:
        agreed[here], expected[here] = before.agreed[there], before.expected[there]
        asked[here] = before.asked[there]
    best, known = best_of(live, number)
    scores[here] = np.where(known.measured, known.scores, np.float32(np.nan))[there]
    if said is not None:
        agreed[rows], expected[rows], asked[rows] = said.agreed, said.expected, number
    return replace(new, history=History(agreed, expected, asked, best, scores))


def decide_late(
    wanted: Promote, task: Task, new: Evidence, live: Evidence | None, *, held: bool = False
) -> Decision:
    """The decision on a fine-tune, which costs more to serve than a head, and took long to train.

    "if_better" asks for measurably more: few are held out, and one of them is no evidence. What was added or
    corrected meanwhile does not speak for it: only examples that both know alike are compared, and a label
    that the live version alone knows withholds it. held: see decide.
    """
    if live is None:
        return decide(wanted, task, new, live, held=held)
    if not held and wanted == "if_better" and label_set(task, live.targets) - label_set(task, new.targets):
        return Decision(False, "label_missing")
    here, there = _comparable(new, live, _pairs(new, live))
    ours, theirs = new.scores[here], live.scores[there]
    found = Decision(wanted == "always", wanted, with_live=_compare(ours, theirs))
    if wanted != "if_better":
        return found
    if held:
        return replace(found, reason="rolled_back")
    if not len(ours):
        return replace(found, reason="not_comparable")
    if ours.mean() <= theirs.mean():
        return replace(found, reason="not_better")
    if _compare(theirs, ours).worse(SIGNIFICANCE):
        return replace(found, promote=True, reason="better")
    return replace(found, reason="cannot_tell")


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


def _changed(task: Task, new: Evidence, live: Evidence, pairs: Pairs) -> str | None:
    if label_set(task, new.targets) - label_set(task, live.targets):
        return "label_added"
    if len(pairs) < len(live.ids):
        return "example_removed"
    if any(not _unchanged(new, live, here, there) for here, there in pairs):
        return "example_corrected"
    return None


def _pairs(new: Evidence, live: Evidence) -> Pairs:
    there = {example: place for place, example in enumerate(live.ids)}
    return [(place, there[example]) for place, example in enumerate(new.ids) if example in there]


def _unchanged(new: Evidence, live: Evidence, here: int, there: int) -> bool:
    return new.targets[here] == live.targets[there] and new.digests[here] == live.digests[there]


def _columns(pairs: Pairs) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    both = np.array(pairs, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _compare(scores: Floats, others: Floats) -> Comparison:
    """Of scores (m,) of the same examples."""
    if not len(scores):
        return Comparison()
    wins, losses = int((scores > others).sum()), int((scores < others).sum())
    return Comparison(
        len(scores),
        float(scores.mean(dtype=np.float64)),
        float(others.mean(dtype=np.float64)),
        loss_p_value(wins, losses),
    )


def _worse_labels(task: Task, targets: Sequence[Target], scores: Floats, others: Floats) -> tuple[str, ...]:
    """The labels whose examples, of these targets (m,), are answered worse; all labels share the level."""
    rows: dict[str, list[int]] = {}
    for row, target in enumerate(targets):
        for label in label_set(task, (target,)):
            rows.setdefault(label, []).append(row)
    level = _LEVEL / max(len(rows), 1)
    return tuple(
        sorted(label for label, own in rows.items() if _compare(scores[own], others[own]).worse(level))
    )


def _comparable(new: Evidence, live: Evidence, pairs: Pairs) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows, in new and in live, of what is unchanged and was measured by both."""
    ours, theirs = new.measured, live.measured
    return _columns([p for p in pairs if ours[p[0]] and theirs[p[1]] and _unchanged(new, live, *p)])


def _with_best(new: Evidence, history: History) -> Comparison:
    both = new.measured & np.isfinite(history.best_scores)
    return _compare(new.scores[both], history.best_scores[both])


def _heard(new: Evidence, history: History) -> Heard | None:
    told = np.isfinite(history.agreed)
    if new.sampled:
        told &= np.array(new.sampled, np.bool_)
    if not told.any():
        return None
    agreed, expected = history.agreed[told], history.expected[told]
    doubt, since = against(agreed, expected, history.asked[told])
    shares = float(agreed.mean(dtype=np.float64)), float(expected.mean(dtype=np.float64))
    return Heard(len(agreed), *shares, doubt, since)


def _mostly_measured(task: Task, evidence: Evidence) -> bool:
    """Whether at least half of the labels have been held out; a label of one input cannot be."""
    if task == "regression":
        return bool(evidence.measured.any())
    inputs: dict[str, set[str]] = {}
    held_out: set[str] = set()
    for digest, target, measured in zip(evidence.digests, evidence.targets, evidence.measured, strict=True):
        for label in label_set(task, (target,)):
            inputs.setdefault(label, set()).add(digest)
            if measured:
                held_out.add(label)
    return 2 * sum(len(inputs[label]) > 1 for label in held_out) >= max(len(inputs), 1)
