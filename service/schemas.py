"""Bodies of requests and answers, as they stand in the API's documentation. Unknown fields are refused."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from adapters.example import Task
from adapters.promotion import Promote
from models.spec import Kind

ADAPTER_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
BIGGEST = 2**31 - 1
"""The largest number of a version, an epoch or a revision that every database can hold."""
MOST_BATCH_PIXELS = 64 * 224**2
"""Of all images of a batch together. On a GPU they go through the network at once."""

AdapterName = Annotated[
    str, Field(pattern=ADAPTER_PATTERN, description="Created on first use.", examples=["pets"])
]
VersionNumber = Annotated[int, Field(ge=1, le=BIGGEST)]
BackboneName = Annotated[str, Field(min_length=1, max_length=512, examples=["efficientnet-lite0"])]
Timings = Annotated[
    dict[str, float],
    Field(
        description="Milliseconds by stage. decode, tokenize and embed add up the work on all inputs, which "
        "runs on several threads; queue is the wait until it began; total is what the caller waited."
    ),
]


class Request(BaseModel):
    """Common to all requests: exact types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class InputIn(Request):
    """One input: an image or a text."""

    image: str | None = Field(
        default=None,
        description="An encoded image (JPEG, PNG, WebP, BMP, GIF, TIFF) in base64, or a data: URI.",
    )
    text: str | None = Field(default=None, examples=["Win a free cruise now!"])


class TargetIn(Request):
    """What is right for an input; exactly one field, which one depends on the task."""

    label: str | None = Field(default=None, description="Of a classification.", examples=["spam"])
    labels: list[str] | None = Field(default=None, description="Of a multilabel adapter; may be empty.")
    target: float | None = Field(default=None, description="Of a regression: a finite number.")


class ExampleIn(InputIn, TargetIn):
    """One example. Without an id it is named by the sha256 of its input."""

    id: str | None = Field(
        default=None, description="1 to 256 characters. A known id replaces that example.", examples=["a1"]
    )


class FineTuneIn(Request):
    """How a network is fine-tuned. See docs/fine-tuning.md."""

    epochs: int = Field(default=8, ge=1, le=100, description="Of everything, at most.")
    full_size_epochs: int = Field(
        default=7, ge=0, le=100, description="The last epochs, in which images have the backbone's own size."
    )
    pixels: int = Field(
        default=128,
        ge=32,
        le=512,
        description="Of an image's side in the other epochs. batch × pixels² is at most 64 × 224².",
    )
    batch: int = Field(default=16, ge=2, le=64, description="Examples in a step.")
    head_rate: float = Field(default=1e-3, gt=0, le=1, description="Learning rate of the head.")
    backbone_rate: float = Field(
        default=1e-4, gt=0, le=0.1, description="Learning rate of the network, 10 to 100 times smaller."
    )
    patience: int = Field(
        default=3, ge=1, le=100, description="Epochs without progress, in its second half, before it stops."
    )
    refit: bool = Field(
        default=True,
        description="Train once more, on the examples held out too, in the way that was found best. Takes "
        "as long again.",
    )
    seed: int = Field(default=0, ge=0, le=BIGGEST)

    @model_validator(mode="after")
    def _fits_memory(self) -> FineTuneIn:
        most = MOST_BATCH_PIXELS // self.pixels**2
        if self.batch > most:
            raise ValueError(f"at {self.pixels} pixels a batch has at most {most} images, not {self.batch}")
        return self


class AdaptRequest(Request):
    """Examples to learn from. Without any, the adapter is fitted again on what it keeps."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "adapter": "mails",
                "examples": [
                    {"id": "m1", "text": "Win a free cruise now!", "label": "spam"},
                    {"id": "m2", "text": "Lunch at noon?", "label": "ham"},
                ],
            }
        }
    )

    adapter: AdapterName
    backbone: BackboneName | None = Field(
        default=None, description="Chosen by the inputs' kind at creation if not given; fixed after."
    )
    task: Task | None = Field(
        default=None, description="classification at creation if not given; fixed after."
    )
    method: Literal["linear_probe", "fine_tune"] = Field(
        default="linear_probe",
        description="fine_tune trains the whole network on all that is kept: a job, answered with 202.",
    )
    fine_tune: FineTuneIn | None = Field(default=None, description="How; only with method fine_tune.")
    update: Literal["append", "replace"] = Field(
        default="append", description="append: a known id replaces that example. replace: forget all others."
    )
    promote: Promote = Field(
        default="if_better", description="if_better withholds only a version that is significantly worse."
    )
    fit: bool = Field(default=True, description="false only stores the examples, to send many in parts.")
    strict: bool = Field(default=False, description="Refuse the request if any example is bad.")
    callback: str | None = Field(
        default=None,
        max_length=2_048,
        description="Of a job: a URL, allowed by the operator, that is told by POST when it has ended.",
    )
    keep_inputs: bool | None = Field(
        default=None, description="Whether inputs are kept beside embeddings (true at creation); fixed after."
    )
    examples: list[ExampleIn] = Field(default_factory=list)


class PredictRequest(Request):
    """Inputs to predict for."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"adapter": "mails", "inputs": [{"text": "Free cruise for lunch?"}]}}
    )

    adapter: AdapterName
    version: VersionNumber | None = Field(default=None, description="null: the live one.")
    top_k: int = Field(default=3, ge=1, le=10_000, description="Probabilities in each answer.")
    explain: int = Field(default=0, ge=0, le=100, description="Nearest examples in each answer.")
    min_epoch: int | None = Field(
        default=None, ge=0, description="The epoch that /adapt answered: see at least what it wrote."
    )
    inputs: list[InputIn] = Field(default_factory=list)


class EmbedRequest(Request):
    """Inputs to embed."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"backbone": "minilm-l6-v2", "inputs": [{"text": "Lunch at noon?"}]}}
    )

    backbone: BackboneName
    inputs: list[InputIn] = Field(default_factory=list)


class OpenAIRequest(Request):
    """The request of OpenAI's embeddings endpoint. Texts only; token ids are not taken."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "minilm-l6-v2", "input": ["Lunch at noon?"]}}
    )

    model: BackboneName = Field(description="A backbone for texts.")
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="base64: of little-endian float32."
    )
    dimensions: int | None = Field(default=None, description="Only the backbone's own number.")
    user: str | None = Field(default=None, description="Not used.")


class PromoteRequest(Request):
    """The version that is to be live."""

    version: VersionNumber = Field(examples=[3])


class FeedbackRequest(InputIn, TargetIn):
    """An input, or the id of a kept example, with the right label."""

    model_config = ConfigDict(json_schema_extra={"example": {"text": "Free lunch today", "label": "ham"}})

    id: str | None = Field(default=None, description="Of a kept example, instead of an input.")
    promote: Promote = "if_better"
    fit: bool = Field(default=True, description="false only stores it, for a later fit.")


class RebaseRequest(Request):
    """The backbone to move to."""

    backbone: BackboneName
    promote: Promote = "if_better"


class ErrorAt(BaseModel):
    """What is wrong where: a JSON pointer into the request."""

    pointer: str = Field(examples=["/examples/3/image"])
    code: str
    detail: str


class ProblemOut(BaseModel):
    """An error (RFC 9457)."""

    type: str = Field(examples=["urn:topwork:unknown_adapter"])
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

    total: int = Field(description="Kept now.")
    added: int
    replaced: int
    removed: int = 0
    rejected: list[RejectedOut] = Field(default_factory=list)


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
    """An answer. label: classification; labels: multilabel; value: regression."""

    label: str | None = None
    labels: list[str] | None = None
    value: float | None = None
    confidence: float | None = None
    abstained: bool = Field(
        description="Better not rely on it: too little confidence, or an input of another world."
    )
    abstention_score: float = Field(
        description="Grows with the doubt that the input belongs to what was taught."
    )
    probabilities: list[LabelProbability] | None = None
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


class EmbedResponse(BaseModel):
    """One embedding, or an error, for each input, in their order."""

    backbone: str
    fingerprint: str
    dim: int
    embeddings: list[EmbeddingOut | FailedItem]
    timing_ms: Timings


class OpenAIEmbedding(BaseModel):
    """One embedding in OpenAI's form."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class OpenAIUsage(BaseModel):
    """Tokens of all texts, special ones included."""

    prompt_tokens: int
    total_tokens: int


class OpenAIResponse(BaseModel):
    """The answer of OpenAI's embeddings endpoint."""

    object: Literal["list"]
    data: list[OpenAIEmbedding]
    model: str
    usage: OpenAIUsage


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
    examples: int
    live: int | None = Field(description="The version that /predict uses.")
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

    fine_tune: phase, epoch, epochs, loss, held_out_accuracy. bulk_adapt: phase, stored, rejected, and, where
    the job is asked for alone, errors.
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
