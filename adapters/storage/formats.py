"""The file formats of embeddings, inputs and evidence, all of them safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from adapters.examples.target import Target
from adapters.storage.artifact import CorruptArtifact
from models.arrays import Bools, Floats, Integers

EMBEDDINGS = "topwork.embeddings/1"
INPUTS = "topwork.inputs/1"
EVIDENCE = "topwork.evidence/1"


@dataclass(frozen=True, slots=True)
class History:
    """What earlier versions said about a version's n examples, in the order of the evidence."""

    # float32 (n,), agreement of an earlier version with each example before it was learned, and what that
    # version claimed, as in agreement.Agreement; NaN if none was asked.
    agreed: Floats
    expected: Floats
    asked: Integers  # int64 (n,), number of the version that was live then, or 0
    best: int  # number of the best version when this one was fitted
    best_scores: Floats  # float32 (n,), scores of the best version; NaN where it has none


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a version was fitted on, and how well each example was predicted by a head that had not seen it.

    There is one entry per example, in the same order in all fields. The position of an example's embedding is
    not stored, because it moves when its neighbours in a segment are erased.
    """

    ids: tuple[str, ...]
    digests: tuple[str, ...]
    targets: tuple[Target, ...]
    scores: Floats  # float32 (n,), see FittedProbe
    sampled: tuple[bool, ...] = ()  # n, False for examples chosen as wrong or hard; empty if all were sampled
    history: History | None = None  # None if a person, or being the first, made the version live

    @property
    def measured(self) -> Bools:
        """The examples that the version was measured on, bool (n,)."""
        scored: Bools = np.isfinite(self.scores)
        return scored & np.array(self.sampled, np.bool_) if self.sampled else scored


def encode_embeddings(embeddings: Floats, fingerprint: str) -> bytes:
    """Encode a segment of embeddings, float32 (n, dim), made by the backbone with this fingerprint."""
    tensors = {"embeddings": np.ascontiguousarray(embeddings, dtype=np.float32)}
    return save(tensors, _about(EMBEDDINGS, fingerprint=fingerprint))


def decode_embeddings(data: bytes) -> Floats:
    """Decode the embeddings of a segment, float32 (n, dim). Raises CorruptArtifact for anything else."""
    return _tensors(data, EMBEDDINGS)["embeddings"]


def encode_inputs(inputs: Sequence[bytes | str]) -> bytearray:
    """Encode a segment of inputs as posted: encoded images, or texts in UTF-8. Not empty, all of one kind.

    The segment is assembled input by input: joining tens of megabytes in one call, as safetensors does, would
    hold the GIL and block every other request.
    """
    kind = "text" if isinstance(inputs[0], str) else "image"
    parts = [item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item for item in inputs]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    size = int(ends[-1])
    header = json.dumps(
        {
            "__metadata__": _about(INPUTS, kind=kind),
            "ends": {"dtype": "I64", "shape": [len(ends)], "data_offsets": [0, ends.nbytes]},
            "bytes": {"dtype": "U8", "shape": [size], "data_offsets": [ends.nbytes, ends.nbytes + size]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    segment = bytearray(8 + len(header) + ends.nbytes + size)
    place = 0
    for part in (len(header).to_bytes(8, "little"), header, ends.astype("<i8").tobytes(), *parts):
        segment[place : place + len(part)] = part
        place += len(part)
    return segment


def decode_inputs(data: bytes) -> list[bytes | str]:
    """Decode the inputs of a segment, in order. Raises CorruptArtifact for anything else."""
    tensors = _tensors(data, INPUTS)
    ends = [int(end) for end in tensors["ends"]]
    content = tensors["bytes"].tobytes()
    parts = [content[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    if _header(data)["kind"] == "text":
        return [part.decode("utf-8", "surrogatepass") for part in parts]
    return list(parts)


def encode_evidence(evidence: Evidence) -> bytes:
    """Encode the evidence of a version."""
    listed = {"ids": evidence.ids, "targets": evidence.targets}
    tensors: dict[str, NDArray[Any]] = {
        "listed": np.frombuffer(json.dumps(listed).encode(), np.uint8),
        "digests": np.frombuffer(bytes.fromhex("".join(evidence.digests)), np.uint8),
        "scores": evidence.scores.astype(np.float32, copy=False),
    }
    if evidence.sampled:
        tensors["sampled"] = np.array(evidence.sampled, np.uint8)
    if (history := evidence.history) is not None:
        tensors |= {
            "history.agreed": history.agreed,
            "history.expected": history.expected,
            "history.asked": history.asked,
            "history.best": np.array([history.best], np.int64),
            "history.best_scores": history.best_scores,
        }
    return save(tensors, _about(EVIDENCE))


def decode_evidence(data: bytes) -> Evidence:
    """Decode the evidence of a version. Raises CorruptArtifact for anything else."""
    tensors = _tensors(data, EVIDENCE)
    listed = json.loads(tensors["listed"].tobytes())
    digests = tensors["digests"].tobytes().hex()
    return Evidence(
        ids=tuple(listed["ids"]),
        digests=tuple(digests[start : start + 64] for start in range(0, len(digests), 64)),
        targets=tuple(tuple(target) if isinstance(target, list) else target for target in listed["targets"]),
        scores=tensors["scores"],
        # Files of the first releases have neither flags nor history.
        sampled=tuple(tensors["sampled"].astype(bool).tolist()) if "sampled" in tensors else (),
        history=_history(tensors) if "history.best" in tensors else None,
    )


def _history(tensors: Mapping[str, NDArray[Any]]) -> History:
    return History(
        agreed=tensors["history.agreed"],
        expected=tensors["history.expected"],
        asked=tensors["history.asked"],
        best=int(tensors["history.best"][0]),
        best_scores=tensors["history.best_scores"],
    )


def _about(form: str, **more: str) -> dict[str, str]:
    return {"format": form, **more}


def _header(data: bytes) -> Mapping[str, str]:
    length = int.from_bytes(data[:8], "little")
    try:
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except ValueError as error:
        raise CorruptArtifact(
            "A stored file does not have the format that its name says. Restore a backup."
        ) from error
    return metadata if isinstance(metadata, dict) else {}


def _tensors(data: bytes, form: str) -> dict[str, NDArray[Any]]:
    found = _header(data).get("format")
    if found != form:
        raise CorruptArtifact(f"A stored file has the format {found!r} where {form!r} is expected.")
    return load(data)
