"""Responses have the form that the API documents, for each task."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adapters.adaptation.promotion.candidate import with_ids
from adapters.adaptation.promotion.decision import decide
from adapters.examples.target import Target, Task
from adapters.prediction.neighbours import Neighbour
from adapters.prediction.predictor import PredictAnswer
from adapters.prediction.scorer import Prediction, shape
from adapters.probe.fit import Dataset, FittedProbe, fit
from adapters.storage.formats import Evidence
from models.arrays import Floats
from models.preprocess.limits import InputError
from service.payloads.responses.predictions import (
    ClassificationOut,
    MultilabelOut,
    PredictResponse,
    RegressionOut,
    render_predictions,
)
from service.payloads.responses.reports import (
    ClassificationReport,
    MultilabelReport,
    RegressionReport,
    Report,
)
from tests.support.service.document import exactly

DIM = 24
TARGETS: dict[Task, list[Target]] = {
    "classification": ["ham", "spam", "other"],
    "multilabel": [("billing",), ("billing", "urgent"), ()],
    "regression": [1.0, 2.5, 4.0],
}
REPORTS = {
    "classification": ClassificationReport,
    "multilabel": MultilabelReport,
    "regression": RegressionReport,
}
PREDICTIONS = {"classification": ClassificationOut, "multilabel": MultilabelOut, "regression": RegressionOut}


def embeddings(rows: int, seed: int = 0) -> Floats:
    """Noisy embeddings: row i lies near the centre of target i modulo 3."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(3, DIM))
    return (centres[np.arange(rows) % 3] + 0.8 * random.normal(size=(rows, DIM))).astype(np.float32)


def fitted(task: Task, rows: int = 60) -> tuple[FittedProbe, Evidence]:
    """A head and its evidence, with some targets that are wrong."""
    targets = [TARGETS[task][(row + (row % 17 == 0)) % 3] for row in range(rows)]
    digests = [f"{row:064x}" for row in range(rows)]
    probe = fit(Dataset(embeddings(rows), targets, digests, task, "f" * 64))
    ids = tuple(f"m{row}" for row in range(rows))
    return probe, Evidence(ids, tuple(digests), tuple(targets), probe.scores, (True,) * rows)


def sent(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("rows", [3, 60])
@pytest.mark.parametrize("task", TARGETS)
def test_a_report_has_the_form_of_its_task(task: Task, rows: int) -> None:
    probe, evidence = fitted(task, rows)
    decision = decide("if_better", task, evidence, evidence)
    report = sent(with_ids(probe.report, evidence.ids) | {"promotion": decision.to_json()})
    exactly(REPORTS[task], report)
    exactly(Report, report)
    for other in REPORTS.keys() - {task}:
        with pytest.raises(ValueError, match="Field required"):
            exactly(REPORTS[other], report)


@pytest.mark.parametrize("task", TARGETS)
def test_a_prediction_has_the_form_of_its_task(task: Task) -> None:
    head = fitted(task)[0].head
    items: list[Prediction | InputError] = [*shape(head, head.predict(embeddings(4, seed=1)), 2)]
    items.append(InputError("input_missing", "No input."))
    answer = PredictAnswer("mails", 3, task, items, {"embed": 0.002, "total": 0.003})
    body = json.loads(bytes(render_predictions(answer, raw=False).body))
    exactly(PredictResponse, body)
    assert body["predictions"][-1] == {"error": {"code": "input_missing", "detail": "No input."}}
    for one in body["predictions"][:-1]:
        exactly(PREDICTIONS[task], one)


def test_marks_and_neighbours_are_there_only_if_asked_for_or_needed() -> None:
    head = fitted("regression")[0].head
    (plain,) = shape(head, head.predict(embeddings(1)), 2)
    marked = replace(plain, truncated=True, nearest=(Neighbour("m1", 1.5, 0.75),))
    answer = PredictAnswer("mails", 3, "regression", [marked], {})
    (found,) = json.loads(bytes(render_predictions(answer, raw=False).body))["predictions"]
    assert list(found) == [
        "value",
        "abstained",
        "abstention_reason",
        "abstention_score",
        "distance",
        "truncated",
        "nearest",
    ]
    assert found["nearest"] == [{"id": "m1", "target": 1.5, "similarity": 0.75}]
