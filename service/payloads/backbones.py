"""Answers that tell of backbones."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import Response

from models.batching.batcher import Batcher
from models.runtime.autotune import MeasuredPlan
from service.payloads.render import Json, answer


def all_backbones(batchers: Mapping[str, Batcher], measured: Mapping[str, MeasuredPlan]) -> Response:
    """Return BackbonesOut."""
    return answer(
        {"backbones": [_backbone(name, batcher, measured[name]) for name, batcher in batchers.items()]}
    )


def _backbone(name: str, batcher: Batcher, measured: MeasuredPlan) -> Json:
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
