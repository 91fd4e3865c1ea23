"""Responses about backbones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from models.batching.batcher import Batcher
from models.runtime.autotune import MeasuredPlan
from models.spec import Kind
from service.payloads.responses.answer import Fingerprint, render


class PlanOut(TypedDict):
    """How a backbone runs on this machine, as it was measured."""

    threads_alone: Annotated[int, Field(description="Threads of a run that has the machine to itself.")]
    runs_beside: Annotated[int, Field(description="Runs at the same time, if inputs wait.")]
    threads_beside: Annotated[int, Field(description="Threads of each of these runs.")]
    batch: Annotated[int, Field(description="The most inputs of one run.")]
    confirmed: Annotated[bool, Field(description="Whether the machine was quiet while this was measured.")]


class BackboneOut(TypedDict):
    """A backbone that can be adapted."""

    name: Annotated[str, Field(examples=["minilm-l6-v2"])]
    kind: Kind
    dim: Annotated[int, Field(description="Numbers in each embedding.", examples=[384])]
    licence: Annotated[str, Field(description="The licence of the weights.", examples=["Apache-2.0"])]
    fingerprint: Fingerprint
    device: Annotated[str, Field(examples=["cpu"])]
    precision: Annotated[str, Field(examples=["float32"])]
    source: Annotated[str, Field(description="Where the weights are from.")]
    plan: PlanOut


class BackbonesOut(TypedDict):
    """All backbones. A new adapter gets the first of its inputs' kind, unless its request names one."""

    backbones: list[BackboneOut]


def render_backbones(batchers: Mapping[str, Batcher], measured: Mapping[str, MeasuredPlan]) -> Response:
    """Return BackbonesOut."""
    body: BackbonesOut = {
        "backbones": [_describe(name, batcher, measured[name]) for name, batcher in batchers.items()]
    }
    return render(body)


def _describe(name: str, batcher: Batcher, measured: MeasuredPlan) -> BackboneOut:
    spec, plan = batcher.backbone.spec, batcher.backbone.plan
    return {
        "name": name,
        "kind": spec.kind,
        "dim": spec.dim,
        "licence": spec.licence,
        "fingerprint": spec.fingerprint,
        "device": batcher.backbone.device,
        "precision": batcher.backbone.precision,
        "source": spec.source,
        "plan": {
            "threads_alone": plan.alone,
            "runs_beside": plan.workers,
            "threads_beside": plan.beside,
            "batch": plan.batch,
            "confirmed": measured.confirmed,
        },
    }
