"""Request bodies, as the API documentation shows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from adapters.adaptation.commands import AdaptCommand, Update
from adapters.adaptation.example_editor import Amendment, Feedback
from adapters.adaptation.promotion.decision import Promote
from adapters.examples.meanings import DESCRIPTION_CHARACTERS, LARGEST_COST, SMALLEST_COST
from adapters.examples.target import Task, Weights
from adapters.examples.validation import PostedExample
from adapters.finetune.config import FineTuneConfig
from adapters.prediction.predictor import PredictQuery
from service.payloads.schema import BIGGEST, NAME_PATTERN, Request, tidied

# The defaults of a request are those of the domain's command.
_ADAPT = AdaptCommand(adapter="")
_PREDICT = PredictQuery(adapter="", inputs=())
_FEEDBACK = Feedback(target=None)
_AMENDMENT = Amendment()
_EXAMPLE = PostedExample(input="")
_MOST_WRONG = 20  # values of one object that are told apart
# The forms of `labels` and of `weights`, which pydantic puts into the location of an error. A label of such a
# name would be taken for a part of the location.
_DICT, _LIST, _COSTS, _WORD = "dict[str,str]", "list[str]", "dict[str,float]", "literal['none','balanced']"
_OPTIONS = frozenset(field.name for field in fields(FineTuneConfig))

AdapterName = Annotated[
    str, Field(pattern=NAME_PATTERN, description="Created on first use.", examples=["pets"])
]
VersionNumber = Annotated[int, Field(ge=1, le=BIGGEST)]
ColumnName = Annotated[
    str | None,
    Field(min_length=1, max_length=256, description="Of a CSV table, where the column has another name."),
]
BackboneName = Annotated[str, Field(min_length=1, max_length=512, examples=["efficientnet-lite0"])]


class InputIn(Request):
    """One input: an image or a text."""

    image: str | None = Field(
        default=None,
        description="An encoded image (JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF) in base64, or a data: URI.",
    )
    text: str | None = Field(default=None, examples=["Win a free cruise now!"])


def _in_field(value: Any) -> Any:
    return {"text": value} if isinstance(value, str) else value


Inputs = Annotated[
    list[Annotated[InputIn, BeforeValidator(_in_field, json_schema_input_type=InputIn | str)]],
    Field(description="Objects with an image or a text, or texts as they are."),
]


class TargetIn(Request):
    """What is right for an input; exactly one field, which one depends on the task."""

    label: str | None = Field(default=None, description="Of a classification.", examples=["spam"])
    labels: Annotated[list[str], Field(fail_fast=True)] | None = Field(
        default=None, description="Of a multilabel adapter; may be empty."
    )
    target: float | None = Field(default=None, description="Of a regression: a finite number.")


class GroupIn(Request):
    """What an example belongs to."""

    group: str | None = Field(
        default=None,
        description="1 to 256 characters: a customer, a video, a thread. Examples of one group never judge "
        "each other.",
        examples=["customer 17"],
    )


class ExampleIn(InputIn, TargetIn, GroupIn):
    """One example. Without an id it is named by the sha256 of its input."""

    id: str | None = Field(
        default=None, description="1 to 256 characters. A known id replaces that example.", examples=["a1"]
    )
    sampled: bool = Field(
        default=_EXAMPLE.sampled,
        description="false: chosen for being wrong or hard. It is learned from and not measured on.",
    )


def _few_wrong(is_right: Callable[[Any], bool]) -> BeforeValidator:
    """Return what keeps, of an object with wrong values, only the first of these.

    pydantic makes an error of each, and holds the GIL until it has made all of them.
    """

    def cut(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        wrong = islice((name for name, one in value.items() if not is_right(one)), _MOST_WRONG)
        return {name: value[name] for name in wrong} or value

    return BeforeValidator(cut)


def _is_description(value: Any) -> bool:
    return value is None or (isinstance(value, str) and 0 < len(value) <= DESCRIPTION_CHARACTERS)


def _is_cost(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and SMALLEST_COST <= value <= LARGEST_COST


def _form_of(value: Any) -> str:
    return _LIST if isinstance(value, list) else _DICT


def _weighing_of(value: Any) -> str:
    return _COSTS if isinstance(value, dict) else _WORD


Labels = Annotated[
    Annotated[
        dict[str, Annotated[str, Field(min_length=1, max_length=DESCRIPTION_CHARACTERS)] | None],
        _few_wrong(_is_description),
        Tag(_DICT),
    ]
    | Annotated[list[str], Field(fail_fast=True), Tag(_LIST)],
    Discriminator(_form_of),
]
WeightsOrCosts = Annotated[
    Annotated[Weights, Tag(_WORD)]
    | Annotated[
        dict[str, Annotated[float, Field(ge=SMALLEST_COST, le=LARGEST_COST)]],
        _few_wrong(_is_cost),
        Tag(_COSTS),
    ],
    Discriminator(_weighing_of),
]


def _tidied_options(value: Any) -> Any:
    return tidied(value, _OPTIONS)


class AdaptForm(Request):
    """What a request to learn may say in any form: JSON, multipart, or the query string of a bulk upload."""

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
    fine_tune: Annotated[FineTuneConfig, BeforeValidator(_tidied_options)] | None = Field(
        default=None, description="How; only with method fine_tune."
    )
    update: Update = Field(
        default=_ADAPT.update,
        description="append: a known id replaces that example. replace: forget all others.",
    )
    promote: Promote = Field(
        default=_ADAPT.promote,
        description="if_better withholds only a version that is significantly worse.",
    )
    fit: bool = Field(
        default=_ADAPT.fit, description="false only stores the examples, to send many in parts."
    )
    strict: bool = Field(default=_ADAPT.strict, description="Refuse the request if any example is bad.")
    callback: str | None = Field(
        default=None,
        max_length=2_048,
        description="Of a job: a URL, allowed by the operator, that is told by POST when it has ended.",
    )
    keep_inputs: bool | None = Field(
        default=None, description="Whether inputs are kept beside embeddings (true at creation); fixed after."
    )
    answer_accuracy: float | None = Field(
        default=None,
        ge=0.5,
        le=0.999,
        description="Share of right answers wanted of what is not abstained on (0.95 at creation); given for "
        "a known adapter, from this fit on.",
    )
    weights: Weights | None = Field(
        default=None,
        description="Of a classification: balanced, and all labels count as equally frequent (none at "
        "creation); given for a known adapter, from this fit on.",
    )


class AdaptRequest(AdaptForm):
    """Examples to learn from, names of labels, or both.

    Without any, the adapter is fitted again on what it keeps.
    """

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

    labels: Labels | None = Field(
        default=None,
        description="Of a classification: what each label means, a description or null for its name "
        "alone; or a list of names. An adapter learns from them before it has examples. They replace those "
        "given before; {} forgets all; left out, they stay.",
        examples=[{"refund": "a customer wants money back", "delivery": None}],
    )
    weights: WeightsOrCosts | None = Field(  # type: ignore[assignment]
        default=None,
        description="Of a classification: balanced, and all labels count as equally frequent (none at "
        "creation); or by label, how much worse it is to miss it than one that is not named, which is 1. "
        "Given for a known adapter, from this fit on.",
        examples=["balanced", {"fraud": 10}],
    )
    examples: list[ExampleIn] = Field(default_factory=list)


class UploadRequest(AdaptForm):
    """What is done with a bulk upload; in the query string."""

    text_column: ColumnName = None
    label_column: ColumnName = None
    labels_column: ColumnName = None
    target_column: ColumnName = None
    id_column: ColumnName = None
    group_column: ColumnName = None

    def columns(self) -> dict[str, str]:
        """Return the given column names of a table, by field."""
        fields = ("text", "label", "labels", "target", "id", "group")
        given = {field: getattr(self, f"{field}_column") for field in fields}
        return {field: name for field, name in given.items() if name is not None}


class PredictRequest(Request):
    """Inputs to predict for."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"adapter": "mails", "inputs": [{"text": "Free cruise for lunch?"}]}}
    )

    adapter: AdapterName
    version: VersionNumber | None = Field(default=None, description="null: the live one.")
    top_k: int = Field(default=_PREDICT.top_k, ge=1, le=10_000, description="Probabilities in each answer.")
    explain: int = Field(
        default=_PREDICT.explain, ge=0, le=100, description="Nearest examples in each answer."
    )
    min_epoch: int | None = Field(
        default=None, ge=0, description="The epoch that /adapt answered: see at least what it wrote."
    )
    inputs: Inputs = Field(default_factory=list)


class EmbedRequest(Request):
    """Inputs to embed."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"backbone": "minilm-l6-v2", "inputs": [{"text": "Lunch at noon?"}]}}
    )

    backbone: BackboneName
    inputs: Inputs = Field(default_factory=list)


def _one_or_many(value: Any) -> str:
    return "many" if isinstance(value, list) else "one"


def _no_token_ids(value: Any) -> Any:
    if isinstance(value, int | list):
        raise PydanticCustomError("token_ids", "Token ids are not supported. Send text.")
    return value


_Text = Annotated[str, BeforeValidator(_no_token_ids)]


class OpenAIRequest(Request):
    """The request of OpenAI's embeddings endpoint. Texts only; token ids are not taken."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "minilm-l6-v2", "input": ["Lunch at noon?"]}}
    )

    model: BackboneName = Field(description="A backbone for texts.")
    input: Annotated[
        Annotated[str, Tag("one")] | Annotated[list[_Text], Field(fail_fast=True), Tag("many")],
        Discriminator(_one_or_many),
    ]
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="base64: of little-endian float32."
    )
    dimensions: int | None = Field(default=None, description="Only the backbone's own number.")
    user: str | None = Field(default=None, description="Not used.")


class PromoteRequest(Request):
    """The version that is to be live."""

    version: VersionNumber = Field(examples=[3])


class FeedbackRequest(InputIn, TargetIn, GroupIn):
    """An input, or the id of a kept example, with the right label.

    A kept example, also one of the same input, keeps its own group, and is sampled as before.
    """

    model_config = ConfigDict(json_schema_extra={"example": {"text": "Free lunch today", "label": "ham"}})

    id: str | None = Field(default=None, description="Of a kept example, instead of an input.")
    sampled: bool = Field(
        default=_FEEDBACK.sampled,
        description="true where you send the right label of every k-th answer, right or wrong. false: it is "
        "learned from and not measured on, for corrections alone are a sample of mistakes.",
    )
    promote: Promote = _FEEDBACK.promote
    fit: bool = Field(default=_FEEDBACK.fit, description="false only stores it, for a later fit.")


class AmendRequest(TargetIn):
    """What is another of a kept example from now on: its label, whether it is used, its group, or several."""

    model_config = ConfigDict(json_schema_extra={"example": {"excluded": True}})

    excluded: bool | None = Field(
        default=None,
        description="true sets the example aside: it is kept, and neither learned from nor measured on. "
        "false takes it back.",
    )
    group: str | None = Field(
        default=None, description="Its new group; empty for none.", examples=["customer 17"]
    )
    promote: Promote = _AMENDMENT.promote
    fit: bool = Field(default=_AMENDMENT.fit, description="false only stores it, for a later fit.")


class RebaseRequest(Request):
    """The backbone to move to."""

    backbone: BackboneName
    promote: Promote = _ADAPT.promote
