"""Response bodies, as the API documentation shows them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from adapters.adaptation.rollback import Gone
from adapters.examples.target import Task, Weights
from adapters.prediction.scorer import Reason
from models.spec import Kind
from service.payloads.requests import Timings

TRUNCATED = "There where the text is longer than the backbone reads: only its start counted."


class ErrorAt(BaseModel):
    """What is wrong where: a JSON pointer into the request."""

    pointer: str = Field(examples=["/examples/3/image"])
    code: str
    detail: str


class ProblemOut(BaseModel):
    """An error (RFC 9457)."""

    type: str = Field(examples=["/docs/errors#unknown_adapter"])
    code: str = Field(examples=["unknown_adapter"])
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[ErrorAt] = Field(default_factory=list)


class ItemError(BaseModel):
    """Why one input could not be used."""

    code: str = Field(examples=["undecodable_image"])
    detail: str


class FailedItem(BaseModel):
    """Stands in the place of an input that could not be used."""

    error: ItemError


class RejectedOut(ItemError):
    """A posted example that was not used."""

    index: int
    id: str | None


class ExamplesOut(BaseModel):
    """What became of the examples."""

    total: int = Field(description="Kept now, those included that are set aside.")
    added: int
    replaced: int
    removed: int = 0
    rejected: list[RejectedOut] = Field(default_factory=list)
    truncated: int = Field(
        default=0, description="Texts among those sent of which the backbone reads only the start."
    )


class AdaptResponse(BaseModel):
    """A new version, or null where nothing was fitted."""

    adapter: str
    version: int | None
    live: bool = Field(description="Whether the new version is the live one.")
    backbone: str
    epoch: int = Field(description="Send it as min_epoch to another process to see at least this.")
    examples: ExamplesOut
    report: dict[str, Any] | None
    timing_ms: Timings


class RemovalResponse(AdaptResponse):
    """What a removal left behind."""

    gone: list[int] = Field(description="Versions that were fitted on what was removed, and went with it.")
    erasure: str | None = Field(description="The number of its receipt; null where nothing was removed.")


class MissingOut(BaseModel):
    """An example of a version that cannot come back."""

    id: str
    reason: Gone = Field(
        description="not_kept: a replacement has forgotten it. other_input: its id has another input now."
    )


class RestoredExamplesOut(BaseModel):
    """What became of the examples when a version was restored."""

    total: int = Field(description="Kept now, those included that are set aside.")
    in_use: int = Field(description="The examples of the version, but for the missing ones.")
    taken_back: int = Field(description="That were set aside before.")
    relabelled: int = Field(description="That have again the target that they had in the version.")
    set_aside: int = Field(description="That were used before, and are not the version's.")
    missing_total: int
    missing: list[MissingOut] = Field(description="The first thousand of those that cannot come back.")


class RestoreResponse(BaseModel):
    """A version that is live again, with its examples."""

    adapter: str
    version: int
    live: bool
    epoch: int = Field(description="Send it as min_epoch to another process to see at least this.")
    examples: RestoredExamplesOut


class ErasureOut(BaseModel):
    """The receipt of an erasure. A backup that is restored forgets again what was erased since.

    Numbers are of what went: adapters, the examples in them, versions, jobs, keys.
    """

    erasure: str = Field(examples=["019abf6e1a2b7c3d9e4f5a6b7c8d9e0f"])
    tenant: str
    erased_at: datetime
    adapters: int
    examples: int
    versions: int
    jobs: int
    keys: int


class LabelProbability(BaseModel):
    """One label's probability."""

    label: str
    probability: float


class NearestOut(BaseModel):
    """A training example near the input, with the target that it was fitted with."""

    id: str
    label: str | None = None
    labels: list[str] | None = None
    target: float | None = None
    similarity: float = Field(description="Cosine of the embeddings.")


class PredictionOut(BaseModel):
    """An answer. label: classification; labels, uncertain: multilabel; value: regression.

    Confidence and probabilities have six digits and are never 0 or 1.
    """

    label: str | None = None
    labels: list[str] | None = None
    uncertain: list[str] | None = Field(
        default=None,
        description="Labels, given or not, whose decision had better not be relied on: of those in `labels` "
        "and in `probabilities`.",
    )
    value: float | None = None
    confidence: float | None = None
    abstained: bool = Field(
        description="Better not rely on it: too little confidence, or an input of another world."
    )
    abstention_reason: Reason | None = Field(
        description="Why; of several reasons, the first in this order. not_measured: there are too few "
        "examples to say how good the adapter is. no_known_tokens: the backbone knows no word of the text. "
        "far_from_examples: the input is of another world. low_confidence: too little of it."
    )
    abstention_score: float = Field(
        ge=0,
        description="Grows with the doubt that the input belongs to what was taught. To rank inputs by: "
        "nothing is decided by it, and it has no limit.",
    )
    distance: float | None = Field(
        ge=0,
        description="From the examples, over the distance accepted: larger is farther, and above 1 the "
        "reason is far_from_examples. null where too few examples were there to tell.",
    )
    probabilities: list[LabelProbability] | None = None
    truncated: Literal[True] | None = Field(default=None, description=TRUNCATED)
    nearest: list[NearestOut] | None = None


class PredictResponse(BaseModel):
    """One answer, or an error, for each input, in their order."""

    adapter: str
    version: int
    predictions: list[PredictionOut | FailedItem]
    timing_ms: Timings


class EmbeddingOut(BaseModel):
    """One input's embedding."""

    embedding: list[float]
    truncated: Literal[True] | None = Field(default=None, description=TRUNCATED)


class EmbedResponse(BaseModel):
    """One embedding, or an error, for each input, in their order."""

    backbone: str
    fingerprint: str
    dim: int
    embeddings: list[EmbeddingOut | FailedItem]
    timing_ms: Timings


class PlanOut(BaseModel):
    """How a backbone runs on this machine, as it was measured."""

    threads_alone: int = Field(description="Threads of a run that has the machine to itself.")
    runs_beside: int = Field(description="Runs beside each other where inputs wait.")
    threads_beside: int = Field(description="Threads of each of those.")
    batch: int = Field(description="Inputs of one run, at most.")
    confirmed: bool = Field(description="Whether the machine was quiet when this was measured.")


class BackboneOut(BaseModel):
    """A backbone that can be adapted."""

    name: str
    kind: Kind
    dim: int
    licence: str
    fingerprint: str
    device: str
    precision: str
    source: str
    plan: PlanOut


class BackbonesOut(BaseModel):
    """All backbones; the first of a kind is chosen where none is named."""

    backbones: list[BackboneOut]


class AdapterOut(BaseModel):
    """An adapter."""

    adapter: str
    backbone: str
    fingerprint: str
    kind: Kind
    task: Task
    keep_inputs: bool
    answer_accuracy: float = Field(description="Wanted of what is not abstained on.")
    weights: Weights
    examples: int = Field(description="Kept, those included that are set aside.")
    live: int | None = Field(description="The version that /predict uses.")
    rolled_back_at: datetime | None = Field(
        description="When a person made an older version live: newer ones are withheld (`rolled_back`) until "
        "a person promotes one, restores a version or says `always`. null: nothing is held."
    )
    revision: int
    epoch: int
    created_at: datetime


class AdaptersOut(BaseModel):
    """A page of adapters in the order of their names."""

    adapters: list[AdapterOut]
    next: str | None = Field(description="Send it as cursor for the next page.")


class VersionOut(BaseModel):
    """A version. It never changes."""

    version: int
    live: bool
    method: str
    backbone: str
    fingerprint: str
    revision: int
    labels: int
    sha256: str
    bytes: int
    created_at: datetime
    report: dict[str, Any]


class VersionsOut(BaseModel):
    """The versions that are kept, the newest first."""

    adapter: str
    versions: list[VersionOut]


class KeptExampleOut(BaseModel):
    """A kept example."""

    id: str
    label: str | None = None
    labels: list[str] | None = None
    target: float | None = None
    group: str | None
    sampled: bool = Field(description="Whether it is measured on, and not only learned from.")
    excluded: bool = Field(description="Whether it is set aside: kept, and not learned from.")
    digest: str = Field(description="sha256 of the input.")
    created_at: datetime


class ExampleOut(KeptExampleOut):
    """A kept example with its input, if inputs are kept."""

    image: str | None = Field(default=None, description="In base64.")
    text: str | None = None


class ExamplesPage(BaseModel):
    """A page of examples in the order of their ids."""

    adapter: str
    examples: list[KeptExampleOut]
    next: str | None = Field(description="Send it as cursor for the next page.")


class JobErrorOut(BaseModel):
    """Why a job failed."""

    code: str = Field(examples=["diverged"])
    detail: str


class JobOut(BaseModel):
    """A job. Its progress is that of the newest attempt: `share` done, `seconds_left`, and by kind.

    Of a job that has succeeded the share is 1 and nothing is left; of one that failed or was cancelled the
    share is what it had reached, and `seconds_left` is null.

    fine_tune: phase, epoch, epochs, loss, held_out_accuracy. bulk_adapt: phase, stored, rejected, truncated,
    skipped, format, and, where the job is asked for alone, errors.
    """

    id: str
    adapter: str
    kind: Literal["fine_tune", "bulk_adapt"]
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    attempt: int
    cancel_requested: bool
    progress: dict[str, Any] | None
    version: int | None = Field(description="The version that it made.")
    error: JobErrorOut | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class SubmittedOut(JobOut):
    """A job that was queued, and what became of the examples sent with it."""

    examples: ExamplesOut | None = Field(description="null for a bulk upload, and where none were sent.")


class JobsOut(BaseModel):
    """A page of jobs, the newest first."""

    jobs: list[JobOut]
    next: str | None = Field(description="Send it as cursor for the next page.")
