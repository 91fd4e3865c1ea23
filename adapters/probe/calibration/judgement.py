"""What a classification answers for held-out examples, and when it abstains because of that."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adapters.heads.answers import NO_ALARM, alarmed, answers_of, confidence_of, nothing
from adapters.probe.calibration import measures
from models.arrays import Bools, Floats, Integers

# Held-out examples of a label, all missed, from which it gets an alarm. One says too little.
_FEWEST_MISSED = 2
# Share of the right answers that all alarms together may cost.
_LOST_ANSWERS = 0.03


@dataclass(frozen=True, slots=True)
class JudgedAnswers:
    """Answers for m held-out examples, and what they say about the answers to come."""

    answers: Integers  # (m,), labels
    confidence: Floats  # (m,), probabilities of the answers
    right: Bools  # (m,)
    likeliest_right: Bools  # (m,), whether the most probable label is right; the same without costs
    alarms: Floats  # (labels,), or (0,) without alarms; see Head
    threshold: float  # confidence below which no answer is given


def judge(probabilities: Floats, own: Integers, costs: Floats, wanted: float) -> JudgedAnswers:
    """Judge the answers for held-out examples, with probabilities (m, labels) and labels `own` (m,).

    `costs`: (labels,), see answers.answers_of. `wanted`: accuracy of the answers that are given. Alarms are
    in force for the threshold: the answers on which they abstain are not given.
    """
    answers = answers_of(probabilities, costs)
    confidence = confidence_of(probabilities, answers)
    right = answers == own
    threshold = measures.answer_threshold(confidence, right, wanted)
    alarms = _alarms(probabilities, own, right, right & (confidence >= threshold))
    if len(alarms):
        given = ~alarmed(probabilities, alarms)
        threshold = measures.answer_threshold(confidence[given], right[given], wanted)
    likeliest_right = answers_of(probabilities, nothing()) == own if len(costs) else right
    return JudgedAnswers(answers, confidence, right, likeliest_right, alarms, threshold)


def _alarms(probabilities: Floats, own: Integers, right: Bools, given: Bools) -> Floats:
    """Return the alarms of the labels that were always missed.

    `given`: (m,), the right answers that are not abstained on. The alarms are equal: the lowest chance of an
    always missed label that costs no more than _LOST_ANSWERS of these answers.
    """
    count = probabilities.shape[1]
    held = np.bincount(own, minlength=count)
    missed = (held >= _FEWEST_MISSED) & (np.bincount(own[right], minlength=count) == 0)
    if not missed.any() or not given.any():
        return nothing()
    chances = probabilities.max(axis=1, where=missed, initial=0.0)[given]
    highest_kept = np.quantile(chances, 1.0 - _LOST_ANSWERS, method="higher")
    alarms = np.full(count, NO_ALARM, dtype=np.float32)
    alarms[missed] = np.nextafter(np.float32(highest_kept), np.float32(1.0))
    return alarms
