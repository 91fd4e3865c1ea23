"""The report of a classification on held-out examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.heads.answers import NO_ALARM
from adapters.probe.calibration import measures
from adapters.probe.calibration.judgement import JudgedAnswers
from models.arrays import Floats, Integers

_MOST_SUSPECTS = 50
_MOST_CONFUSIONS = 500
_LOW_RECALL = 0.5  # recall below which a label is warned about
_MOST_NAMED = 5  # labels that the warning names


@dataclass(frozen=True, slots=True)
class CrossValidated:
    """Predictions for m held-out examples."""

    probabilities: Floats  # (m, labels)
    rows: Integers  # (m,), the examples' rows in the data
    own: Integers  # (m,), the examples' labels
    judged: JudgedAnswers


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
    probabilities, own, judged = held_out.probabilities, held_out.own, held_out.judged
    alone = np.zeros(0, dtype=np.int64) if unmeasured is None else unmeasured
    answers, right = judged.answers, judged.right
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
        "labels_not_measured": int((np.bincount(own, minlength=len(names))[sizes > 0] == 0).sum()),
        "per_label": _per_label(own, judged, sizes, names),
        "confusion": _confusion(own, answers, names),
        "calibration_error": measures.calibration_error(judged.confidence, right) if measured else None,
        "suspects": _suspects(held_out, doubtful[:_MOST_SUSPECTS], names),
        "suspects_total": len(doubtful),
    }
    return report | {"warnings": [*_warnings(report), *_without_examples(sizes, names)]}


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
    per_label = report["per_label"]
    missed = [name for name, one in per_label.items() if (one["recall"] or 0.0) < _LOW_RECALL]
    missed = [name for name in missed if per_label[name]["recall"] is not None]
    if missed:
        detail = (
            f"Less than half is recognised of {_listed(missed)}. Send more examples of them, or, if they are "
            'rare and matter as much as others, use "weights": "balanced".'
        )
        found.append({"code": "low_recall", "detail": detail})
    alarmed = [name for name, one in per_label.items() if one["alarm"] is not None]
    if alarmed:
        detail = (
            f"No held-out example was recognised of {_listed(alarmed)}. The adapter abstains on inputs that "
            "may be of these labels, and so on some of others. Send more examples of them."
        )
        found.append({"code": "labels_missed", "detail": detail})
    return found


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(map(repr, labels[:_MOST_NAMED]))
    return f"{shown} and others" if len(labels) > _MOST_NAMED else shown


def _without_examples(sizes: Integers, names: tuple[str, ...]) -> list[dict[str, str]]:
    """Return a warning if labels have a name and no example."""
    missing = [name for name, size in zip(names, sizes.tolist(), strict=True) if not size]
    if not missing:
        return []
    shown = ", ".join(repr(name) for name in missing[:_MOST_NAMED])
    more = " and others" if len(missing) > _MOST_NAMED else ""
    detail = (
        f"{shown}{more} have no examples: their names alone say when they are answered, and no score covers "
        "them. Send two examples of each label, or more."
    )
    return [{"code": "labels_without_examples", "detail": detail}]


def _per_label(
    own: Integers, judged: JudgedAnswers, sizes: Integers, names: tuple[str, ...]
) -> dict[str, dict[str, float | int | None]]:
    """Return precision, recall and F1 on held-out examples, None if undefined; support is of all examples."""
    count, answers = len(names), judged.answers
    alarms = judged.alarms.tolist() or [NO_ALARM] * count
    hits = np.bincount(own[own == answers], minlength=count).tolist()
    given = np.bincount(answers, minlength=count).tolist()
    held = np.bincount(own, minlength=count).tolist()
    return {
        name: {
            "precision": hit / answered if answered else None,
            "recall": hit / there if there else None,
            "f1": 2.0 * hit / (answered + there) if there else None,
            "support": support,
            "alarm": alarm if alarm < NO_ALARM else None,
        }
        for name, hit, answered, there, support, alarm in zip(
            names, hits, given, held, sizes.tolist(), alarms, strict=True
        )
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
