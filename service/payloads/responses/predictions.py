"""Responses of /predict and /embed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NotRequired

from pydantic import Field
from pydantic_core import to_json
from starlette.responses import Response
from typing_extensions import TypedDict

from adapters.prediction.neighbours import Neighbour
from adapters.prediction.predictor import PredictAnswer
from adapters.prediction.scorer import Prediction, Reason
from models.backbone import Embedded
from models.batching.batcher import Batcher
from models.preprocess.limits import InputError
from service.payloads.responses.answer import (
    AdapterName,
    FailedItem,
    Fingerprint,
    Timings,
    TruncatedOut,
    describe_failure,
    describe_truncation,
    render,
    to_milliseconds,
)
from service.payloads.responses.examples import TargetOut, describe_target


class LabelProbability(TypedDict):
    """One label's probability."""

    label: Annotated[str, Field(examples=["spam"])]
    probability: Annotated[float, Field(examples=[0.983104])]


class NearestOut(TargetOut):
    """A training example near the input, with the target that it was fitted with."""

    id: Annotated[str, Field(examples=["m1"])]
    similarity: Annotated[float, Field(description="The cosine of the embeddings.", examples=[0.71])]


class AnyPrediction(TruncatedOut):
    """What every prediction has."""

    abstained: Annotated[
        bool, Field(description="Whether not to rely on the prediction; `abstention_reason` says why.")
    ]
    abstention_reason: Annotated[
        Reason | None,
        Field(
            description="Of several reasons, the first in this order. not_measured: there are too few "
            "examples to say how good the adapter is. no_known_tokens: the backbone knows no word of the "
            "text. far_from_examples: the input is unlike the examples. low_confidence: the confidence is "
            "too low. missed_label: the input may be of a label that was never recognised, see `alarm` in "
            "the report."
        ),
    ]
    abstention_score: Annotated[
        float,
        Field(
            ge=0,
            description="Grows with the doubt that the input is like the examples. Use it to rank inputs: it "
            "decides nothing, and it has no upper bound.",
            examples=[0.42],
        ),
    ]
    distance: Annotated[
        float | None,
        Field(
            ge=0,
            description="The distance from the examples, over the largest one accepted: above 1 the reason "
            "is far_from_examples. null: there were too few examples to tell.",
            examples=[0.64],
        ),
    ]
    nearest: NotRequired[
        Annotated[list[NearestOut], Field(description="The nearest examples, if the request has `explain`.")]
    ]


class ConfidenceOut(TypedDict):
    """How sure a prediction of labels is. Numbers have six digits and are never 0 or 1."""

    confidence: Annotated[
        float,
        Field(
            description="The probability of the label answered, or of the least certain of several "
            "decisions. Costs do not change it.",
            examples=[0.983104],
        ),
    ]
    probabilities: Annotated[list[LabelProbability], Field(description="The `top_k` labels, highest first.")]


class ClassificationOut(ConfidenceOut, AnyPrediction):
    """The answer of a classification for one input."""

    label: Annotated[
        str,
        Field(
            description="The most probable label; if labels have costs, the one that is worst to miss, with "
            "the highest product of probability and cost.",
            examples=["spam"],
        ),
    ]


class MultilabelOut(ConfidenceOut, AnyPrediction):
    """The answer of a multilabel adapter for one input."""

    labels: Annotated[Sequence[str], Field(examples=[["billing", "urgent"]])]
    uncertain: Annotated[
        Sequence[str],
        Field(
            description="Labels in `labels` and in `probabilities` whose decision, given or not given, "
            "should not be relied on."
        ),
    ]


class RegressionOut(AnyPrediction):
    """The answer of a regression for one input."""

    value: Annotated[float, Field(examples=[1.5])]


PredictionOut = ClassificationOut | MultilabelOut | RegressionOut


class PredictResponse(TypedDict):
    """A prediction, or an error, for each input, in the order of the inputs."""

    adapter: AdapterName
    version: Annotated[int, Field(description="The version that answered.", examples=[3])]
    predictions: list[PredictionOut | FailedItem]
    timing_ms: Timings


class EmbeddingOut(TruncatedOut):
    """The embedding of one input."""

    embedding: Annotated[list[float], Field(examples=[[0.12, -0.03]])]


class EmbedResponse(TypedDict):
    """An embedding, or an error, for each input, in the order of the inputs."""

    backbone: Annotated[str, Field(examples=["minilm-l6-v2"])]
    fingerprint: Fingerprint
    dim: Annotated[int, Field(description="Numbers in each embedding.", examples=[384])]
    embeddings: list[EmbeddingOut | FailedItem]
    timing_ms: Timings


def render_predictions(found: PredictAnswer, *, raw: bool) -> Response:
    """Return PredictResponse. Raises the InputError of a failed raw input."""
    if raw and isinstance(found.items[0], InputError):
        raise found.items[0]
    body: PredictResponse = {
        "adapter": found.adapter,
        "version": found.version,
        "predictions": [_describe_prediction(item) for item in found.items],
        "timing_ms": to_milliseconds(found.timings),
    }
    return render(body)


def render_embeddings(batcher: Batcher, name: str, found: Embedded, *, raw: bool) -> bytes:
    """Return EmbedResponse as JSON. Slow: run in a thread. Raises the InputError of a failed raw input."""
    if raw and found.errors:
        raise found.errors[0]
    spec = batcher.backbone.spec
    body: EmbedResponse = {
        "backbone": name,
        "fingerprint": spec.fingerprint,
        "dim": spec.dim,
        "embeddings": [],
        "timing_ms": to_milliseconds(found.timings),
    }
    # Rows are serialised one by one, so that other threads can run in between.
    rows = b",".join(to_json(_describe_embedding(found, index)) for index in range(len(found.embeddings)))
    before, after = to_json(body).split(b'"embeddings":[]')
    return before + b'"embeddings":[' + rows + b"]" + after


def _describe_embedding(found: Embedded, index: int) -> EmbeddingOut | FailedItem:
    if index in found.errors:
        return describe_failure(found.errors[index])
    return {"embedding": found.embeddings[index].tolist(), **describe_truncation(index in found.truncated)}


def _describe_prediction(item: Prediction | InputError) -> PredictionOut | FailedItem:
    if isinstance(item, InputError):
        return describe_failure(item)
    rest: AnyPrediction = {
        "abstained": item.abstained,
        "abstention_reason": item.abstention_reason,
        "abstention_score": item.abstention_score,
        "distance": item.distance,
    }
    if item.truncated:
        rest["truncated"] = True
    if item.nearest is not None:
        rest["nearest"] = [_describe_neighbour(one) for one in item.nearest]
    if item.value is not None:
        return {"value": item.value, **rest}
    confidence: ConfidenceOut = {
        "confidence": item.confidence,
        "probabilities": [{"label": label, "probability": chance} for label, chance in item.probabilities],
    }
    if item.label is not None:
        return {"label": item.label, **confidence, **rest}
    return {"labels": item.labels or (), **confidence, "uncertain": item.uncertain or (), **rest}


def _describe_neighbour(one: Neighbour) -> NearestOut:
    return {"id": one.id, **describe_target(one.target), "similarity": one.similarity}
