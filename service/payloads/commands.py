"""Requests as the domain's commands, once their form is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from adapters.adaptation.commands import AdaptCommand
from adapters.examples.meanings import read_costs, read_meanings
from adapters.examples.target import ExampleError, Weights
from adapters.examples.validation import PostedExample
from adapters.finetune.config import FineTuneConfig
from adapters.jobs.submission import FINE_TUNE
from models.preprocess.limits import InputError
from service.errors import Problem
from service.payloads.content import input_of
from service.payloads.requests import AdaptForm, AdaptRequest, ExampleIn, InputIn, TargetIn
from service.payloads.validation import Fault

# Fields that a request and its command have alike.
_SHARED = AdaptForm.model_fields.keys() & {field.name for field in fields(AdaptCommand)}
_SHARED -= {"fine_tune", "weights"}


def adapt_command(body: AdaptForm, posted: Sequence[PostedExample], *, job: bool = False) -> AdaptCommand:
    """Return the command. `job`: the work is done later.

    Raises Problem for options that do not fit, and LabelsInvalid.
    """
    tunes = body.method == FINE_TUNE
    if body.callback is not None and not (tunes or job):
        raise Problem(
            422,
            "invalid_request",
            "`callback` is for jobs only, and this request is answered at once. Leave it out.",
        )
    if body.fine_tune is not None and not tunes:
        raise Problem(
            422,
            "invalid_request",
            "`fine_tune` has options of a fine-tune. Set `method` to fine_tune as well.",
        )
    labels = body.labels if isinstance(body, AdaptRequest) else None
    weights, costs = _weights_of(body.weights)
    return AdaptCommand(
        posted=posted,
        weights=weights,
        costs=costs,
        meanings=None if labels is None else read_meanings(labels),
        fine_tune=(body.fine_tune or FineTuneConfig()) if tunes else None,
        **body.model_dump(include=_SHARED),
    )


def _weights_of(
    given: Weights | Mapping[str, float] | None,
) -> tuple[Weights | None, Mapping[str, float] | None]:
    """Return the weights and the costs that are asked for; each ends the other."""
    if given is None:
        return None, None
    return (given, {}) if isinstance(given, str) else ("none", read_costs(given))


def posted_example(example: ExampleIn) -> PostedExample:
    """Return an example whose form is right; its input may still be an error."""
    return PostedExample(
        input=input_of(example),
        blamed=_source(example),
        target=target_of(example),
        id=example.id,
        group=example.group,
        sampled=example.sampled,
    )


def faulty_example(value: Any, index: int, fault: Fault) -> PostedExample:
    """Return a malformed example as one whose input is an error."""
    example = value["examples"][index]
    name = example.get("id") if isinstance(example, dict) else None
    known = name if isinstance(name, str) else None
    return PostedExample(InputError(fault.code, fault.detail), id=known, blamed=fault.place)


def target_of(one: TargetIn) -> object:
    """Return the label, the labels or the value; None without any, an ExampleError if there are several."""
    given = [value for value in (one.label, one.labels, one.target) if value is not None]
    if len(given) > 1:
        return ExampleError("label_invalid", "Give only one of label, labels and target.")
    return given[0] if given else None


def _source(one: InputIn) -> str:
    """Return the field of the input, image or text; "" unless exactly one is given."""
    if (one.image is None) == (one.text is None):
        return ""
    return "text" if one.image is None else "image"
