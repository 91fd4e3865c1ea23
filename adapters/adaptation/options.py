"""What an adapter's versions are fitted for: options that may change with any fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from adapters.examples.target import Task, Weights
from adapters.registry.records import AdapterRecord, Creation
from models.errors import Invalid


class WeightsNotForTask(Invalid):
    """Balanced weights, or costs, were requested for a task other than classification.

    Its examples have no label, or several.
    """

    code = "weights_not_for_task"

    def __init__(self, task: Task) -> None:
        super().__init__(
            f"Weights are for classification, and the adapter's task is {task}. Leave `weights` out."
        )


class LabelsNotForTask(Invalid):
    """Names of labels were given for a task other than classification."""

    code = "labels_not_for_task"

    def __init__(self, task: Task) -> None:
        super().__init__(
            f"Names of labels are for classification, and the adapter's task is {task}. Leave `labels` out."
        )


class WeightsLabelUnknown(Invalid):
    """A label was given a cost, and the adapter has neither an example nor a name of it."""

    code = "weights_label_unknown"

    def __init__(self, unknown: Collection[str]) -> None:
        named = ", ".join(map(repr, sorted(unknown)[:5])) + (" and others" if len(unknown) > 5 else "")
        super().__init__(
            f"`weights` names {named}, and the adapter has no example and no name of it. Send an example, "
            "name it in `labels`, or leave it out."
        )


@dataclass(frozen=True, slots=True)
class FitOptions:
    """Options as a request gives them. None leaves the adapter's own value."""

    answer_accuracy: float | None = None  # see ProbeConfig
    weights: Weights | None = None
    # By label, see read_costs and read_meanings. What is given replaces all that was there.
    costs: Mapping[str, float] | None = None
    meanings: Mapping[str, str] | None = None

    @classmethod
    def of_job(cls, request: Mapping[str, Any]) -> FitOptions:
        """Return the options in a job's request; older releases wrote only some of them, or none."""
        return cls(**{field.name: request.get(field.name) for field in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        """Return the options as in a job's request."""
        return asdict(self)


def terms_of(adapter: AdapterRecord) -> Creation:
    """Return the adapter's settings."""
    return Creation(
        backbone=adapter.backbone,
        fingerprint=adapter.fingerprint,
        kind=adapter.kind,
        task=adapter.task,
        keep_inputs=adapter.keep_inputs,
        answer_accuracy=adapter.answer_accuracy,
        weights=adapter.weights,
        meanings=adapter.meanings,
        costs=adapter.costs,
    )


def with_options(terms: Creation, options: FitOptions) -> Creation:
    """Return the terms with the given options. Raises WeightsNotForTask, LabelsNotForTask."""
    if terms.task != "classification":
        if options.weights == "balanced" or options.costs:
            raise WeightsNotForTask(terms.task)
        if options.meanings:
            raise LabelsNotForTask(terms.task)
    given = {name: value for name, value in options.to_json().items() if value is not None}
    return replace(terms, **given)


def check_costs(costs: Mapping[str, float], labels: Collection[str]) -> None:
    """Raise WeightsLabelUnknown unless every label with a cost is one of `labels`."""
    unknown = costs.keys() - labels
    if unknown:
        raise WeightsLabelUnknown(unknown)
