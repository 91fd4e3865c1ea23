"""Decisions of a multilabel head on held-out examples, and what is measured on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.probe.calibration import measures
from models.arrays import Bools, Doubles, Floats, Integers

# The threshold that gives the best F1 is half of that F1 (Lipton et al. 2014): far below 0.05 if it is rare.
_GRID = np.concatenate([np.arange(1, 5) / 100.0, np.arange(1, 20) / 20.0]).astype(np.float32)
# Number of examples with which a label's own best threshold counts as much as the common one.
_PRIOR_EXAMPLES = 10.0
_MOST_SUSPECTS = 50
# Number of decisions, about, that temperature and thresholds are fitted on; more do not change them.
MOST_DECISIONS = 1 << 21
# A decision is suspect if its probability is less than this share of what such decisions usually have.
_SUSPECT_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class HeldOutDecisions:
    """Decisions on m held-out examples, and what is measured on them."""

    probabilities: Floats  # float32 (m, labels)
    own: Bools  # (m, labels), the labels present
    known: Bools  # (m, labels), whether the label could be learned without the example's fold
    usual: Bools  # (m, labels), whether most examples of the other folds have the label
    folds: Integers  # (m,)
    groups: Integers  # (m,)

    def decide(self) -> tuple[Floats, Bools]:
        """Return the thresholds of labels (labels,), and the labels assigned to examples (m, labels).

        The thresholds that measure a fold come from the other folds, as everything else does. A label that
        all training examples of a fold had, or none, is assigned to all of the fold, or to none.
        """
        folds = np.unique(self.folds)
        counts = [self._counts(self.folds == fold) for fold in folds]
        total = sum(counts, np.zeros((2 * len(_GRID) + 1, self.own.shape[1])))
        assigned = self.usual.copy()
        for fold, part in zip(folds, counts, strict=True):
            there = self.folds == fold
            given = self.probabilities[there] >= _best_thresholds(total - part)
            assigned[there] = np.where(self.known[there], given, self.usual[there])
        return _best_thresholds(total), assigned

    def _counts(self, there: Bools) -> Doubles:
        """Count hits and labels given at each threshold, and labels present, as (2 grid + 1, labels)."""
        probabilities, known = self.probabilities[there], self.known[there]
        own = self.own[there] & known
        result = np.empty((2 * len(_GRID) + 1, own.shape[1]))
        for place, edge in enumerate(_GRID):
            given = (probabilities >= edge) & known
            result[place], result[len(_GRID) + place] = (given & own).sum(axis=0), given.sum(axis=0)
        result[-1] = own.sum(axis=0)
        return result

    def certain(self, assigned: Bools, wanted: float) -> tuple[float, float]:
        """Return the confidences from which the wanted share of decisions is right: labels given, not given.

        They are separate, because labels not given are nearly always right and would vouch for labels given.
        """
        some = slice(None, None, 1 + assigned.size // MOST_DECISIONS)
        answer, known, probabilities = assigned[some], self.known[some], self.probabilities[some]
        right = answer == self.own[some]
        given, absent = answer & known, ~answer & known
        return (
            measures.answer_threshold(probabilities[given], right[given], wanted),
            measures.answer_threshold(1.0 - probabilities[absent], right[absent], wanted),
        )

    def report(self, assigned: Bools) -> dict[str, Any]:
        """Return the numbers for all labels together; a label that could not be learned counts as missed."""
        measured = bool(self.known.any())
        hits, given, there = _counts(self.own, assigned).sum(axis=1).tolist()
        micro_f1 = _f1(hits, given, there) if measured else None
        interval = self._f1_interval(assigned) if micro_f1 is not None else None
        constant = _constant_f1(self.own.sum(axis=0), len(self.own)) if measured else None
        warnings = []
        if interval is not None and constant is not None and interval[0] <= constant:
            detail = (
                f"The same labels for every input have an F1 of {constant:.2f}: it is not known to do better."
            )
            warnings.append({"code": "no_better_than_constant", "detail": detail})
        known = self.known
        return {
            "micro_f1": micro_f1,
            "micro_f1_interval": interval,
            "constant_f1": constant,
            "exact_match": float((assigned == self.own).all(axis=1).mean()) if measured else None,
            "labels_not_measured": int((~(self.own & known).any(axis=0)).sum()),
            "calibration_error": measures.calibration_error(self.probabilities[known], self.own[known])
            if measured
            else None,
            "warnings": warnings,
        }

    def _f1_interval(self, assigned: Bools) -> list[float]:
        """Return the 95 % interval of micro-F1 on a test set; see measures.share_interval.

        F1 is the share of labels hit in the mean of labels given and labels present. Its scatter between
        groups of examples says how many independent answers they are worth.
        """
        place = np.unique(self.groups, return_inverse=True)[1]
        hits = np.bincount(place, weights=(self.own & assigned).sum(axis=1))
        answers = np.bincount(place, weights=0.5 * (self.own.sum(axis=1) + assigned.sum(axis=1)))
        n, total = len(answers), float(answers.sum())
        share = float(hits.sum()) / total
        scatter = float(((hits - share * answers) ** 2).sum()) * n / max(n - 1, 1)
        spread = share * (1.0 - share) * total**2
        # The worth is limited to the actual number, because the scatter is sometimes too small by chance.
        worth = min(spread / scatter, total) if spread and scatter else total
        return measures.share_interval(share, worth, n)

    def per_label(
        self, assigned: Bools, support: Integers, decisions: Floats, names: tuple[str, ...]
    ) -> dict[str, dict[str, float | int | None]]:
        """Return precision, recall and F1, None if undefined. `support`: (labels,), of all examples."""
        hits, given, there = _counts(self.own & self.known, assigned & self.known).tolist()
        return {
            name: {
                "precision": hit / answered if answered else None,
                "recall": hit / present if present else None,
                "f1": _f1(hit, answered, present) if present else None,
                "support": count,
                "threshold": threshold,
            }
            for name, hit, answered, present, count, threshold in zip(
                names, hits, given, there, support.tolist(), decisions.tolist(), strict=True
            )
        }

    def suspects(self, rows: Integers, names: tuple[str, ...]) -> dict[str, Any]:
        """Return labels that look missing or wrong, the most doubtful first. `rows`: (m,), of the examples.

        Confident learning (Northcutt et al. 2021) for each label, yes or no: the other answer is at least as
        likely as it is when it is right, and the given one less than a quarter as likely as usual.
        """
        there, absent = self.own & self.known, ~self.own & self.known
        # The mean probability of the right answer, for examples with the label and without it.
        yes = np.sum(self.probabilities, axis=0, where=there) / np.maximum(there.sum(axis=0), 1)
        no = 1.0 - np.sum(self.probabilities, axis=0, where=absent) / np.maximum(absent.sum(axis=0), 1)
        removed = np.minimum(np.minimum(_SUSPECT_SHARE * yes, 1.0 - no), 0.5)
        added = np.maximum(np.maximum(1.0 - _SUSPECT_SHARE * no, yes), 0.5)
        doubtful = there & (self.probabilities < removed)
        doubtful |= absent & there.any(axis=0) & (self.probabilities > added)
        places, labels = np.nonzero(doubtful)
        chances, remove = self.probabilities[places, labels], self.own[places, labels]
        confidence = np.where(remove, 1.0 - chances, chances)
        first = np.argsort(-confidence, kind="stable")[:_MOST_SUSPECTS]
        return {
            "suspects": [
                {
                    "index": int(rows[places[one]]),
                    "label": names[labels[one]],
                    "suggests": "remove" if remove[one] else "add",
                    "confidence": float(confidence[one]),
                }
                for one in first
            ],
            "suspects_total": len(places),
        }


def _counts(own: Bools, assigned: Bools) -> Integers:
    """Return hits, labels assigned and labels present, as (3, labels)."""
    counts: Integers = np.stack([(own & assigned).sum(axis=0), assigned.sum(axis=0), own.sum(axis=0)])
    return counts


def _f1(hits: float, assigned: float, there: float) -> float | None:
    return 2.0 * hits / (assigned + there) if assigned + there else None


def _constant_f1(there: Integers, n: int) -> float:
    """Return the best micro-F1 of one answer for all n examples. `there`: (labels,), counts of the labels."""
    hits = np.cumsum(np.sort(there)[::-1])
    labels = np.arange(1, len(hits) + 1)
    return float((2.0 * hits / (n * labels + hits[-1])).max())


def _best_thresholds(counts: Doubles) -> Floats:
    """Return the threshold with the best F1 per label, drawn to the best common one.

    `counts`: see HeldOutDecisions._counts.
    """
    size = len(_GRID)
    hits, assigned, there = counts[:size], counts[size:-1], counts[-1]
    if not there.any():
        return np.full(counts.shape[1], 0.5, dtype=np.float32)
    common = 2.0 * hits.sum(axis=1) / np.maximum(assigned.sum(axis=1) + there.sum(), 1.0)
    # Each label gets a few pseudo-examples that fare as all labels do together.
    share = _PRIOR_EXAMPLES / float(there.sum())
    smooth = (
        2.0
        * (hits + share * hits.sum(axis=1, keepdims=True))
        / np.maximum(assigned + there + share * (assigned.sum(axis=1, keepdims=True) + there.sum()), 1e-9)
    )
    # Ties go to the threshold nearest to a half.
    distance = np.abs(_GRID - 0.5)
    best = (smooth + 1e-6 * common[:, None] - 1e-9 * distance[:, None]).argmax(axis=0)
    result: Floats = _GRID[best]
    return result
