"""Renders the domain's results in the form of service/payloads/responses.py.

Answers are plain JSON values, because an instance of a model for each would cost more.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import from_json, to_json
from starlette.responses import Response

from adapters.adaptation.commands import AdaptOutcome, RevisionResult
from adapters.adaptation.rollback import RestoredVersion
from adapters.examples.target import Target
from adapters.examples.validation import RejectedExample
from adapters.jobs.submission import Submitted
from adapters.prediction.neighbours import Neighbour
from adapters.prediction.predictor import PredictAnswer
from adapters.prediction.scorer import Prediction
from adapters.registry.erasures import Receipt
from adapters.registry.idempotency import StoredReply
from adapters.registry.records import AdapterRecord, ExampleRecord, JobRecord, VersionRecord
from models.backbone import Embedded
from models.batching.batcher import Batcher
from models.preprocess.limits import InputError

Json = dict[str, Any]
_MOST_MISSING = 1_000  # missing examples listed in an answer

REJECTED_KEPT = 100
"""Rejected examples that a stored reply lists; the original answer lists all."""
_SHORT = 4_096  # bytes; a shorter answer has fewer rejected examples

_THREADED = frozenset({"decode", "tokenize", "embed"})  # stages that several threads work on at once


def answer(value: Json, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    """Return a JSON response."""
    return Response(to_json(value, inf_nan_mode="null"), status, headers, "application/json")


def adapted(outcome: AdaptOutcome) -> Response:
    """Return AdaptResponse."""
    return answer(_revised(outcome.revised, outcome.rejected, outcome.timings))


def revised(done: RevisionResult) -> Response:
    """Return AdaptResponse for feedback or a rebase."""
    return answer(_revised(done, [], done.timings))


def kept(body: bytes) -> bytes:
    """Return the part of an answer that is stored to be repeated: at most REJECTED_KEPT rejected examples."""
    if len(body) < _SHORT:
        return body
    value = from_json(body)
    rejected = (value.get("examples") or {}).get("rejected", [])
    if len(rejected) <= REJECTED_KEPT:
        return body
    del rejected[REJECTED_KEPT:]
    return to_json(value)


def repeated(found: StoredReply) -> Response:
    """Return the stored answer to an earlier request with the same Idempotency-Key."""
    headers = {"Idempotency-Replayed": "true"}
    if found.status == 202:
        headers |= _where(json.loads(found.body)["id"])
    return Response(found.body, found.status, headers, "application/json")


def job(record: JobRecord) -> Json:
    """Return JobOut."""
    failed = record.error_code is not None
    return {
        "id": record.id,
        "adapter": record.adapter,
        "kind": record.kind,
        "state": record.state,
        "attempt": record.attempt,
        "cancel_requested": record.cancel_requested,
        "progress": None if record.progress is None else dict(record.progress),
        "version": record.version,
        "error": {"code": record.error_code, "detail": record.error_detail} if failed else None,
        "created_at": record.created_at,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
    }


def submitted(record: JobRecord, stored: AdaptOutcome | None = None) -> Response:
    """Return SubmittedOut with the job's Location. `stored`: what became of the examples sent with it."""
    examples = None if stored is None else _examples(stored.revised, stored.rejected)
    return answer({**job(record), "examples": examples}, _where(record.id), status=202)


def tuning(done: Submitted) -> Response:
    """Return SubmittedOut for a fine-tune."""
    return submitted(*done)


def one_job(record: JobRecord) -> Response:
    """Return JobOut."""
    return answer(job(record))


def jobs(records: Sequence[JobRecord], limit: int) -> Response:
    """Return JobsOut, a page. `records`: one more than `limit` if there is a next page."""
    page = records[:limit]
    following = cursor(page[-1].id) if len(records) > limit else None
    return answer({"jobs": [job(record) for record in page], "next": following})


def removed(done: RevisionResult) -> Response:
    """Return RemovalResponse."""
    committed = done.committed
    more = {"gone": committed.erased, "erasure": committed.erasure}
    return answer(_revised(done, [], done.timings) | more)


def restored(done: RestoredVersion) -> Response:
    """Return RestoreResponse."""
    rollback, missing = done.rollback, done.rollback.missing
    return answer(
        {
            "adapter": done.adapter.name,
            "version": done.version,
            "live": True,
            "epoch": done.adapter.epoch,
            "examples": {
                "total": done.adapter.examples,
                "in_use": rollback.in_use,
                "taken_back": rollback.taken_back,
                "relabelled": rollback.relabelled,
                "set_aside": rollback.set_aside,
                "missing_total": len(missing),
                "missing": [{"id": one.id, "reason": one.reason} for one in missing[:_MOST_MISSING]],
            },
        }
    )


def erased(receipt: Receipt) -> Response:
    """Return ErasureOut."""
    counts = {name: getattr(receipt, name) for name in ("adapters", "examples", "versions", "jobs", "keys")}
    return answer({"erasure": receipt.id, "tenant": receipt.tenant, "erased_at": receipt.at, **counts})


def predicted(found: PredictAnswer, *, raw: bool) -> Response:
    """Return PredictResponse. Raises the InputError of a failed raw input."""
    if raw and isinstance(found.items[0], InputError):
        raise found.items[0]
    return answer(
        {
            "adapter": found.adapter,
            "version": found.version,
            "predictions": [_prediction(item, found.task) for item in found.items],
            "timing_ms": _milliseconds(found.timings),
        }
    )


def embedded(batcher: Batcher, name: str, found: Embedded, *, raw: bool) -> bytes:
    """Return EmbedResponse as JSON. Slow: run in a thread. Raises the InputError of a failed raw input."""
    if raw and found.errors:
        raise found.errors[0]
    spec = batcher.backbone.spec
    head = {"backbone": name, "fingerprint": spec.fingerprint, "dim": spec.dim}
    # Rows are serialised one by one, so that other threads can run in between.
    items = [
        to_json(
            _failed(found.errors[index])
            if index in found.errors
            else {"embedding": row.tolist(), **truncation(index in found.truncated)}
        )
        for index, row in enumerate(found.embeddings)
    ]
    tail = to_json({"timing_ms": _milliseconds(found.timings)})
    return to_json(head)[:-1] + b',"embeddings":[' + b",".join(items) + b"]," + tail[1:]


def adapter(record: AdapterRecord) -> Json:
    """Return AdapterOut."""
    return {
        "adapter": record.name,
        "backbone": record.backbone,
        "fingerprint": record.fingerprint,
        "kind": record.kind,
        "task": record.task,
        "keep_inputs": record.keep_inputs,
        "answer_accuracy": record.answer_accuracy,
        "weights": record.weights,
        "examples": record.examples,
        "live": record.live,
        "rolled_back_at": record.rolled_back_at,
        "revision": record.revision,
        "epoch": record.epoch,
        "created_at": record.created_at,
    }


def adapters(records: Sequence[AdapterRecord], limit: int) -> Response:
    """Return AdaptersOut, a page. `records`: one more than `limit` if there is a next page."""
    page = records[:limit]
    following = cursor(page[-1].name) if len(records) > limit else None
    return answer({"adapters": [adapter(record) for record in page], "next": following})


def one_adapter(record: AdapterRecord) -> Response:
    """Return AdapterOut with the ETag of its alias."""
    return answer(adapter(record), {"ETag": record.etag})


def version(record: VersionRecord, owner: AdapterRecord) -> Json:
    """Return VersionOut."""
    return {
        "version": record.number,
        "live": record.number == owner.live,
        "method": record.method,
        "backbone": record.backbone,
        "fingerprint": record.fingerprint,
        "revision": record.revision,
        "labels": record.labels,
        "sha256": record.artifact.sha256,
        "bytes": record.artifact.length,
        "created_at": record.created_at,
        "report": dict(record.report),
    }


def versions(owner: AdapterRecord, records: Sequence[VersionRecord]) -> Response:
    """Return VersionsOut."""
    return answer({"adapter": owner.name, "versions": [version(record, owner) for record in records]})


def one_version(owner: AdapterRecord, record: VersionRecord) -> Response:
    """Return VersionOut."""
    return answer(version(record, owner))


def file(content: bytes, name: str) -> Response:
    """Return a file to download."""
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type="application/octet-stream", headers=headers)


def example(record: ExampleRecord) -> Json:
    """Return KeptExampleOut."""
    return {
        "id": record.id,
        **_target(record.target),
        "group": record.group,
        "sampled": record.sampled,
        "excluded": record.excluded,
        "digest": record.digest,
        "created_at": record.created_at,
    }


def examples(owner: AdapterRecord, records: Sequence[ExampleRecord], limit: int) -> Response:
    """Return ExamplesPage. `records`: one more than `limit` if there is a next page."""
    page = records[:limit]
    following = cursor(page[-1].id) if len(records) > limit else None
    return answer(
        {"adapter": owner.name, "examples": [example(record) for record in page], "next": following}
    )


def one_example(owner: AdapterRecord, record: ExampleRecord, value: bytes | str | None) -> Response:
    """Return ExampleOut. `value`: the input, an image as bytes or a text; None if inputs are not kept."""
    if isinstance(value, bytes):
        return answer(example(record) | {"image": base64.b64encode(value).decode()})
    return answer(example(record) | ({} if value is None else {"text": value}))


def cursor(last: str) -> str:
    """Return an opaque cursor for the entries after a name or an id."""
    return base64.urlsafe_b64encode(last.encode()).decode().rstrip("=")


def _where(job_id: str) -> dict[str, str]:
    """Return the headers that say where and when to ask for a job."""
    return {"Location": f"/jobs/{job_id}", "Retry-After": "5"}


def _examples(done: RevisionResult, rejected: Sequence[RejectedExample]) -> Json:
    committed = done.committed
    return {
        "total": done.adapter.examples,
        "added": committed.added,
        "replaced": committed.replaced,
        "removed": committed.removed,
        "rejected": [
            {"index": one.index, "id": one.id, "code": one.code, "detail": one.detail} for one in rejected
        ],
        **({"truncated": done.truncated} if done.truncated else {}),
    }


def _revised(done: RevisionResult, rejected: Sequence[RejectedExample], timings: Mapping[str, float]) -> Json:
    made = done.version
    return {
        "adapter": done.adapter.name,
        "version": None if made is None else made.number,
        "live": done.live,
        "backbone": done.adapter.backbone,
        "epoch": done.adapter.epoch,
        "examples": _examples(done, rejected),
        "report": None if made is None else dict(made.report),
        "timing_ms": _milliseconds(timings),
    }


def _prediction(item: Prediction | InputError, task: str) -> Json:
    if isinstance(item, InputError):
        return _failed(item)
    found: Json
    if task == "regression":
        found = {"value": item.value}
    else:
        named = {"label": item.label} if task == "classification" else {"labels": item.labels}
        found = {
            **named,
            "confidence": item.confidence,
            "probabilities": [
                {"label": label, "probability": chance} for label, chance in item.probabilities
            ],
        }
        if item.uncertain is not None:
            found["uncertain"] = item.uncertain
    found |= {
        "abstained": item.abstained,
        "abstention_reason": item.abstention_reason,
        "abstention_score": item.abstention_score,
        "distance": item.distance,
    }
    found |= truncation(item.truncated)
    if item.nearest is not None:
        found["nearest"] = [_neighbour(one) for one in item.nearest]
    return found


def _neighbour(one: Neighbour) -> Json:
    return {"id": one.id, **_target(one.target), "similarity": one.similarity}


def _target(target: Target) -> Json:
    if isinstance(target, str):
        return {"label": target}
    return {"labels": target} if isinstance(target, tuple) else {"target": target}


def truncation(truncated: bool) -> Json:
    """Return the field that marks a text of which only the start was read."""
    return {"truncated": True} if truncated else {}


def _failed(error: InputError) -> Json:
    return {"error": {"code": error.code, "detail": error.detail}}


def _milliseconds(timings: Mapping[str, float]) -> dict[str, float]:
    """Return milliseconds by stage that add up to `total`, with `other` for time outside the stages.

    Stages that several threads work on at once get their shares of the time that passed.
    """
    stages = {stage: seconds for stage, seconds in timings.items() if stage != "total"}
    total = timings.get("total", sum(stages.values()))
    work = sum(seconds for stage, seconds in stages.items() if stage in _THREADED)
    passed = total - (sum(stages.values()) - work)
    if work > passed:
        share = max(passed, 0.0) / work
        stages = {stage: one * share if stage in _THREADED else one for stage, one in stages.items()}
    found = {stage: round(seconds * 1e3, 3) for stage, seconds in stages.items()}
    whole = round(total * 1e3, 3)
    return {**found, "other": max(0.0, round(whole - sum(found.values()), 3)), "total": whole}
