"""The report of a version: how well it predicts, by task, and why it was promoted or not.

Reports are made in adapters/probe and adapters/finetune, and kept as JSON.
"""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

Interval = Annotated[
    Annotated[list[float], Field(min_length=2, max_length=2)] | None,
    Field(description="Its 95 % interval: the lower and the upper end.", examples=[[0.93, 0.99]]),
]
Threshold = Annotated[
    float, Field(description="The confidence below which the adapter abstains.", examples=[0.71])
]
Strength = Annotated[
    float,
    Field(description="The strength of the regularisation, chosen on held-out examples.", examples=[0.1]),
]
CalibrationError = Annotated[
    float | None,
    Field(
        description="The mean distance between confidence and share of right answers (ECE).", examples=[0.02]
    ),
]


class WarningOut(TypedDict):
    """What a reader of the numbers should know."""

    code: Annotated[
        str,
        Field(
            description="not_measured, labels_not_measured, labels_without_examples, low_recall, "
            "labels_missed, no_better_than_majority, no_better_than_constant, no_better_than_mean, "
            "label_name_unknown or labels_not_readable.",
            examples=["no_better_than_majority"],
        ),
    ]
    detail: str


class LabelScores(TypedDict):
    """How one label is recognised; null where nothing can be said."""

    precision: Annotated[float | None, Field(description="Right answers in all answers with the label.")]
    recall: Annotated[float | None, Field(description="Right answers in all held-out examples of the label.")]
    f1: Annotated[float | None, Field(description="The harmonic mean of both.")]
    support: Annotated[int, Field(description="Examples with the label, those not held out included.")]


class AnsweredLabelScores(LabelScores):
    """How one label of a classification is recognised."""

    alarm: NotRequired[
        Annotated[
            float | None,
            Field(
                description="For a label that was never recognised: its probability from which the adapter "
                "abstains, because the input may be of it. null for the others.",
                examples=[0.04],
            ),
        ]
    ]


class LabelDecision(LabelScores):
    """How one label of a multilabel adapter is recognised."""

    threshold: Annotated[float, Field(description="The probability from which the label is given.")]


class LabelSuspect(TypedDict):
    """An example whose label looks wrong."""

    id: Annotated[str, Field(examples=["m17"])]
    label: Annotated[str, Field(description="The label that it has.", examples=["ham"])]
    looks_like: Annotated[str, Field(description="The label that it looks like.", examples=["spam"])]
    confidence: Annotated[float, Field(description="The probability of that label.", examples=[0.97])]


class MultilabelSuspect(TypedDict):
    """An example with a label that looks wrong, or without one that looks missing."""

    id: Annotated[str, Field(examples=["m17"])]
    label: Annotated[str, Field(examples=["urgent"])]
    suggests: Annotated[Literal["add", "remove"], Field(description="What to do with the label.")]
    confidence: Annotated[float, Field(description="The probability that this is right.", examples=[0.97])]


class TargetSuspect(TypedDict):
    """An example whose target looks wrong."""

    id: Annotated[str, Field(examples=["m17"])]
    target: Annotated[float, Field(description="The target that it has.", examples=[95.0])]
    looks_like: Annotated[float, Field(description="The value predicted without it.", examples=[9.4])]
    deviations: Annotated[
        float, Field(description="The error, in robust standard deviations of all errors.", examples=[6.3])
    ]


class TunedScore(TypedDict):
    """The scores of a network on the examples held out."""

    loss: Annotated[float, Field(description="Mean cross-entropy in nats.")]
    accuracy: float


class FineTuneOut(TypedDict):
    """How a network was fine-tuned."""

    epochs: Annotated[int, Field(description="Epochs of training of the whole network.")]
    refit_epochs: Annotated[int, Field(description="Epochs on all examples afterwards; 0 without `refit`.")]
    mix: Annotated[
        float,
        Field(description="Where the weights lie between the unchanged backbone (0) and the best epoch (1)."),
    ]
    frozen: Annotated[TunedScore, Field(description="With the backbone unchanged.")]
    tuned: Annotated[TunedScore, Field(description="With the weights that were chosen.")]


class ExportOut(TypedDict):
    """The comparison of the exported network with the trained one."""

    probes: Annotated[int, Field(description="Inputs compared.")]
    largest_difference: Annotated[float, Field(description="The largest difference of a logit.")]


class BestComparison(TypedDict):
    """The comparison with the best version so far."""

    version: int
    compared: Annotated[int, Field(description="Unchanged examples that both were measured on.")]
    score: Annotated[float | None, Field(description="The mean score of the new version.")]
    best_score: Annotated[float | None, Field(description="The mean score of the best version.")]
    p_value: float | None


class AgreementOut(TypedDict):
    """How live versions predicted the new examples before these were learned."""

    examples: Annotated[int, Field(description="Examples asked about.")]
    agreed: Annotated[float, Field(description="The share that was predicted right.")]
    expected: Annotated[float, Field(description="The share that the versions claimed to predict right.")]
    doubt: Annotated[
        float, Field(description="Evidence that the new examples are wrong; above 25 it decides.")
    ]
    since_version: Annotated[int, Field(description="The version that was live when the count began.")]


class PromotionOut(TypedDict):
    """Whether the version was made live, and what that rests on.

    Scores are means over the examples compared: accuracy; the F1 of an example's labels for a multilabel
    adapter; minus the mean squared error for a regression.
    """

    promoted: bool
    reason: Annotated[
        str,
        Field(
            description="first, always, never, not_worse, not_comparable, worse, worse_labels, disagrees, "
            "not_measured, rolled_back, and others; the API guide explains them.",
            examples=["not_worse"],
        ),
    ]
    compared: Annotated[
        int, Field(description="Unchanged examples that this and the live version were measured on.")
    ]
    score: Annotated[float | None, Field(description="The mean score of this version.")]
    live_score: Annotated[float | None, Field(description="The mean score of the live version.")]
    p_value: Annotated[
        float | None, Field(description="The probability of so many losses if this version is as good.")
    ]
    best: BestComparison | None
    worse_labels: Annotated[
        list[str], Field(description="Labels that are recognised less often than before.")
    ]
    agreement: AgreementOut | None


class AnyReport(TypedDict):
    """What every report has. The numbers are from examples that the predicting fit had not seen."""

    method: Annotated[
        str, Field(description="How it was measured.", examples=["5-fold out-of-fold", "not measured"])
    ]
    near_copies: NotRequired[
        Annotated[
            int, Field(description="Inputs that are near copies of another; they never judge each other.")
        ]
    ]
    suspects_total: Annotated[int, Field(description="How many there are; `suspects` lists the first fifty.")]
    warnings: list[WarningOut]
    promotion: PromotionOut


class ClassificationReport(AnyReport):
    """How well a classification predicts; null where too few examples were measured."""

    accuracy: Annotated[float | None, Field(examples=[0.97])]
    accuracy_interval: Interval
    balanced_accuracy: Annotated[float | None, Field(description="The mean recall of the labels.")]
    majority_share: Annotated[
        float | None, Field(description="The accuracy of always answering the most frequent label.")
    ]
    labels_not_measured: Annotated[
        int, Field(description="Labels without an example that could be held out.")
    ]
    per_label: dict[str, AnsweredLabelScores]
    confusion: Annotated[
        dict[str, dict[str, int]],
        Field(
            description="Held-out examples by label and by label answered: all right answers and the most "
            "frequent mistakes.",
            examples=[{"spam": {"spam": 41, "ham": 2}, "ham": {"ham": 57}}],
        ),
    ]
    calibration_error: CalibrationError
    suspects: list[LabelSuspect]
    temperature: Annotated[float, Field(description="Logits were divided by it to calibrate the confidence.")]
    threshold: Threshold
    strength: NotRequired[Strength]
    discriminant: NotRequired[
        Annotated[
            float, Field(description="The weight of the linear discriminant beside the logistic regression.")
        ]
    ]
    names: NotRequired[
        Annotated[float, Field(description="The weight of the names of labels beside the examples.")]
    ]
    fine_tune: NotRequired[FineTuneOut]
    export: NotRequired[ExportOut]


class CertainOut(TypedDict):
    """The confidences from which a decision about a label can be relied on."""

    given: Annotated[float, Field(description="For a label that is given.")]
    not_given: Annotated[float, Field(description="For a label that is not given.")]


class MultilabelReport(AnyReport):
    """How well a multilabel adapter predicts; null where too few examples were measured."""

    micro_f1: Annotated[float | None, Field(description="F1 over all decisions together.", examples=[0.83])]
    micro_f1_interval: Interval
    constant_f1: Annotated[
        float | None, Field(description="The F1 of the best answer that is the same for all inputs.")
    ]
    exact_match: Annotated[
        float | None, Field(description="The share of examples with exactly the right labels.")
    ]
    labels_not_measured: Annotated[
        int, Field(description="Labels without an example that could be held out.")
    ]
    per_label: dict[str, LabelDecision]
    calibration_error: CalibrationError
    suspects: list[MultilabelSuspect]
    strength: Strength
    temperature: Annotated[float, Field(description="Logits were divided by it to calibrate the confidence.")]
    certain: CertainOut


class RegressionReport(AnyReport):
    """How well a regression predicts; null where too few examples were measured."""

    r2: Annotated[
        float | None, Field(description="The share of the variance that is explained (R²).", examples=[0.81])
    ]
    r2_interval: Interval
    rmse: Annotated[
        float | None, Field(description="The root of the mean squared error, in the unit of the targets.")
    ]
    suspects: list[TargetSuspect]
    strength: Strength


Report = ClassificationReport | MultilabelReport | RegressionReport
