"""Heads applied to embeddings: inputs that arrive together for the same head are answered in one pass."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from adapters.heads.answers import Predictions
from adapters.heads.head import Head
from adapters.prediction.neighbours import Neighbour
from models.arrays import Floats

Reason = Literal["not_measured", "no_known_tokens", "far_from_examples", "low_confidence", "missed_label"]
"""Why an answer should not be relied on; if several reasons apply, the first of these."""

# Probabilities are answered with six digits, because more are not known, and are never 0 or 1.
_DIGITS = 6
_LEAST, _MOST = 0.000001, 0.999999
# Heads with more weights than this answer from a thread: on the event loop they would delay all requests.
_WEIGHTS_ON_LOOP = 1 << 16


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one input; see answers.Predictions.

    `confidence`, `probabilities`: rounded to six digits, above 0 and below 1. `distance`: see
    answers.Predictions, six digits; None if there were too few examples to tell. `label`: of a
    classification; with costs it need not be the most probable.
    `labels`: those assigned, of a multilabel adapter. `uncertain`: of these and of the labels in
    `probabilities`, those whose decision should not be relied on. `value`: of a regression. `probabilities`:
    the top_k labels, highest first. `truncated`: only the start of the text was read.
    """

    confidence: float
    abstention_score: float
    distance: float | None = None
    abstention_reason: Reason | None = None
    label: str | None = None
    labels: tuple[str, ...] | None = None
    uncertain: tuple[str, ...] | None = None
    value: float | None = None
    probabilities: tuple[tuple[str, float], ...] = ()
    nearest: tuple[Neighbour, ...] | None = None
    truncated: bool = False

    @property
    def abstained(self) -> bool:
        """Whether the answer should not be relied on."""
        return self.abstention_reason is not None


# Waiting embeddings, and the future of their predictions.
_Waiting = tuple[Floats, asyncio.Future[list[Prediction]]]


class HeadScorer:
    """Applies heads. For one event loop. `observe(seconds)` is called with the duration of each pass.

    Callers whose inputs were in one batch of a backbone wake together. A pass is forty small numpy
    operations, whatever the number of rows, so callers with the same head share one.
    """

    def __init__(self, observe: Callable[[float], None]) -> None:
        self._observe = observe
        self._waiting: dict[tuple[int, int], tuple[Head, list[_Waiting]]] = {}

    async def answer(
        self, head: Head, embeddings: Floats, top_k: int, *, alone: bool = False
    ) -> list[Prediction]:
        """Return a prediction for each row of the embeddings, float32 (n, dim).

        `alone`: no other caller wakes together with this one.
        """
        if head.weight.size > _WEIGHTS_ON_LOOP:
            return await asyncio.to_thread(self._pass, head, embeddings, top_k)
        if alone and not self._waiting:
            return self._pass(head, embeddings, top_k)
        loop = asyncio.get_running_loop()
        if not self._waiting:
            # The flush runs after all callers that woke in this round of the loop have come here.
            loop.call_soon(self._flush)
        future: asyncio.Future[list[Prediction]] = loop.create_future()
        _, waiting = self._waiting.setdefault((id(head), top_k), (head, []))
        waiting.append((embeddings, future))
        return await future

    def _flush(self) -> None:
        groups, self._waiting = self._waiting, {}
        for (_, top_k), (head, waiting) in groups.items():
            try:
                answers = self._pass(head, np.concatenate([rows for rows, _ in waiting]), top_k)
            except Exception as error:
                for _, future in waiting:
                    if not future.done():
                        future.set_exception(error)
                continue
            begin = 0
            for rows, future in waiting:
                end = begin + len(rows)
                if not future.done():  # the caller may have been cancelled
                    future.set_result(answers[begin:end])
                begin = end

    def _pass(self, head: Head, embeddings: Floats, top_k: int) -> list[Prediction]:
        started = time.perf_counter()
        answers = shape(head, head.predict(embeddings), top_k)
        self._observe(time.perf_counter() - started)
        return answers


def _reason(head: Head, confidence: float, distance: float) -> Reason:
    """Return the reason why the head abstains from an answer."""
    if not head.measured:
        return "not_measured"
    if distance > 1.0:
        return "far_from_examples"
    # Only alarms make a head abstain above its threshold.
    return "missed_label" if len(head.alarms) and confidence >= head.threshold else "low_confidence"


def shape(head: Head, found: Predictions, top_k: int) -> list[Prediction]:
    """Return one Prediction per row of `found`; equal probabilities are in the order of the labels."""
    count = min(top_k, len(head.labels))
    order = (-found.probabilities).argsort(axis=1, kind="stable")[:, :count]
    chances = found.probabilities[np.arange(len(order))[:, None], order].tolist()
    values = None if found.values is None else found.values.tolist()
    single = head.task == "classification"
    chosen = None if found.chosen is None else found.chosen.tolist()
    answers = []
    for row, (places, confidence, abstained, distance, score) in enumerate(
        zip(
            order.tolist(),
            found.confidence.tolist(),
            found.abstained.tolist(),
            found.distance.tolist(),
            found.abstention_score.tolist(),
            strict=True,
        )
    ):
        ranked = [head.labels[place] for place in places]
        answers.append(
            Prediction(
                confidence=_shown(confidence),
                abstention_score=score,
                distance=None if head.region is None else round(distance, _DIGITS),
                abstention_reason=_reason(head, confidence, distance) if abstained else None,
                label=(ranked[0] if chosen is None else head.labels[chosen[row]]) if single else None,
                labels=_assigned(head, found, row),
                uncertain=_uncertain(head, found, row, places),
                value=None if values is None else values[row],
                probabilities=tuple(zip(ranked, map(_shown, chances[row]), strict=True)),
            )
        )
    return answers


def _assigned(head: Head, found: Predictions, row: int) -> tuple[str, ...] | None:
    if found.assigned is None:
        return None
    return tuple(head.labels[int(place)] for place in np.flatnonzero(found.assigned[row]))


def _uncertain(head: Head, found: Predictions, row: int, shown: Sequence[int]) -> tuple[str, ...] | None:
    """Return the answered labels with an uncertain decision. `shown`: indexes of those with probabilities."""
    if found.assigned is None or found.uncertain is None:
        return None
    answered = found.assigned[row].copy()
    answered[list(shown)] = True
    return tuple(head.labels[int(place)] for place in np.flatnonzero(found.uncertain[row] & answered))


def _shown(chance: float) -> float:
    """Return a probability as it is answered: rounded and clipped."""
    return min(max(round(chance, _DIGITS), _LEAST), _MOST)
