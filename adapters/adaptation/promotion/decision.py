"""Promotion of new versions: withheld if measurably worse, or if the new examples look wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

import numpy as np

from adapters.adaptation.promotion.agreement import Agreement, against
from adapters.adaptation.promotion.comparison import (
    NOT_COMPARED,
    Comparison,
    Pairs,
    columns_of,
    common_examples,
    comparable_rows,
    compare,
    is_unchanged,
)
from adapters.examples.target import Target, Task, label_set
from adapters.registry.records import AdapterRecord
from adapters.storage.formats import Evidence, History
from models.arrays import Floats

Promote = Literal["if_better", "always", "never"]

# Levels for many appends: of twenty adapters that get twenty appends of right examples, one has a version
# withheld. The measurements are in docs/decisions.md, "Promotion".
_LEVEL = 0.0004  # p-value of a comparison
_MOST_DOUBT = 25.0  # growth of the stake in agreement.against
# Level of the only comparison of a fine-tune.
SIGNIFICANCE = 0.05


@dataclass(frozen=True, slots=True)
class Heard:
    """What live versions predicted for new examples before these were learned.

    `examples`: number of examples asked about. `agreed`: share predicted rightly; `expected`: share claimed
    (means of agreement.Agreement). `doubt`: how many times a stake on wrong examples has grown; above 25 the
    claim is refuted. `since`: the version that was live when that began.
    """

    examples: int
    agreed: float
    expected: float
    doubt: float
    since: int


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to promote, and why.

    `with_live`, `with_best`: the new version compared with the live one and with the best one so far, number
    `best`. `worse_labels`: labels whose recall has fallen. `heard`: None if no version was asked about new
    examples. `fallback`: the version to make live if this one is withheld; None keeps the live one.
    """

    promote: bool
    reason: str
    with_live: Comparison = NOT_COMPARED
    with_best: Comparison = NOT_COMPARED
    best: int | None = None
    worse_labels: tuple[str, ...] = ()
    heard: Heard | None = None
    fallback: int | None = None

    @property
    def proved(self) -> bool:
        """Whether its comparisons made the version live, so that later ones continue from there.

        A person who makes a withheld version live, or asks for `always`, has judged what it learned.
        """
        return self.promote and self.reason not in ("first", "always")

    def to_json(self) -> dict[str, Any]:
        """Return the decision as in a version's report."""
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
    """Return what a job of time `asked` may promote: a later rollback by a person overrides `always`."""
    went_back = (adapter.rolled_back_at, adapter.restored_at)
    overtaken = any(at is not None and asked <= at for at in went_back)
    return "if_better" if overtaken and wanted == "always" else wanted


def decide(
    wanted: Promote, task: Task, new: Evidence, live: Evidence | None, *, held: bool = False
) -> Decision:
    """Decide on a new version. `live`: evidence of the live one, None if nothing is live or it has none.

    `held`: a person has rolled back to the live version, and only "always" overrides that. `new`: evidence
    with its history, see `remember`.

    "if_better" promotes unless one of these holds. The examples learned since disagree with the claims of the
    versions before. On unchanged examples the new version is measurably worse than the live one or the best
    one so far, or worse on a label (one-sided exact McNemar test; sign test for regression). Nothing can be
    compared, the live version was measured on at least half of its labels, and the new one on less than half.
    Examples added, removed or corrected meanwhile change none of that.
    """
    if live is None:
        if held and wanted == "if_better":
            return Decision(False, "rolled_back")
        return Decision(wanted != "never", "first" if wanted == "if_better" else wanted)
    pairs = common_examples(new, live)
    here, there = comparable_rows(new, live, pairs)
    ours, theirs = new.scores[here], live.scores[there]
    history = new.history
    found = Decision(
        wanted == "always",
        wanted,
        with_live=compare(ours, theirs),
        with_best=NOT_COMPARED if history is None else _with_best(new, history),
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
    """Return the number of the best version so far, and its evidence. `number`: of the live version.

    This is the live version, unless the best one before it scores better on the examples that both were
    measured on. The best version is asked about new examples, because a version that has learned wrong ones
    claims less.
    """
    before = live.history
    if before is not None:
        both = np.isfinite(before.best_scores) & live.measured
        if both.any() and before.best_scores[both].mean() > live.scores[both].mean():
            return before.best, replace(live, scores=before.best_scores)
    return number, live


def unlearned(task: Task, new: Evidence, live: Evidence) -> list[int]:
    """Return the rows of `new` whose inputs are not in `live`, and whose labels `live` was measured on.

    `live`: evidence of the version that is asked, see `best_of`. One row per input, and sampled examples
    only: those that were chosen for being wrong would speak against every version.
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
    """Return `new` with the history of `live`, and with what was `said` of `rows` while that was live.

    `number`: of the live version. Records of an example whose target or input has changed are left out.
    """
    count = len(new.ids)
    agreed, expected = np.full(count, np.nan, np.float32), np.full(count, np.nan, np.float32)
    asked, scores = np.zeros(count, np.int64), np.full(count, np.nan, np.float32)
    here, there = columns_of([pair for pair in common_examples(new, live) if is_unchanged(new, live, *pair)])
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
    """Decide on a fine-tune, which costs more to serve than a head and took long to train.

    "if_better" requires a measurable gain: few examples are held out, and one of them is no evidence.
    Examples added or corrected meanwhile do not count in its favour: only examples that both versions know
    unchanged are compared, and a label that only the live version knows withholds it. `held`: see `decide`.
    """
    if live is None:
        return decide(wanted, task, new, live, held=held)
    if not held and wanted == "if_better" and label_set(task, live.targets) - label_set(task, new.targets):
        return Decision(False, "label_missing")
    here, there = comparable_rows(new, live, common_examples(new, live))
    ours, theirs = new.scores[here], live.scores[there]
    found = Decision(wanted == "always", wanted, with_live=compare(ours, theirs))
    if wanted != "if_better":
        return found
    if held:
        return replace(found, reason="rolled_back")
    if not len(ours):
        return replace(found, reason="not_comparable")
    if ours.mean() <= theirs.mean():
        return replace(found, reason="not_better")
    if compare(theirs, ours).worse(SIGNIFICANCE):
        return replace(found, promote=True, reason="better")
    return replace(found, reason="cannot_tell")


def _changed(task: Task, new: Evidence, live: Evidence, pairs: Pairs) -> str | None:
    if label_set(task, new.targets) - label_set(task, live.targets):
        return "label_added"
    if len(pairs) < len(live.ids):
        return "example_removed"
    if any(not is_unchanged(new, live, here, there) for here, there in pairs):
        return "example_corrected"
    return None


def _worse_labels(task: Task, targets: Sequence[Target], scores: Floats, others: Floats) -> tuple[str, ...]:
    """Return the labels, among the targets (m,), that are predicted worse; all labels share the level."""
    rows: dict[str, list[int]] = {}
    for row, target in enumerate(targets):
        for label in label_set(task, (target,)):
            rows.setdefault(label, []).append(row)
    level = _LEVEL / max(len(rows), 1)
    return tuple(
        sorted(label for label, own in rows.items() if compare(scores[own], others[own]).worse(level))
    )


def _with_best(new: Evidence, history: History) -> Comparison:
    both = new.measured & np.isfinite(history.best_scores)
    return compare(new.scores[both], history.best_scores[both])


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
    """Return whether at least half of the labels were held out; a label with one input cannot be."""
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
