"""Appends a head's nodes to an exported backbone: one self-contained ONNX file, without the onnx package.

An ONNX file is a protobuf message, and messages are lists of fields in any order: what is added to a graph
can be written behind what is there. Only the graph's outputs are replaced. Field numbers are those of
onnx.proto3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.head import Head
from adapters.region import Region
from models.preprocess import Silence
from models.spec import IDS, MASK, OUTPUT_NAME

PROBABILITIES = "probabilities"
VALUES = "values"
ASSIGNED = "assigned"
UNCERTAIN = "uncertain"
ABSTAINED = "abstained"
DISTANCE = "distance"

_PREFIX = "topwork_head_"

_MODEL_GRAPH, _MODEL_METADATA = 7, 14
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_OUTPUT = 1, 5, 12
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FLOAT, _INT64, _BOOL, _DOUBLE = 1, 7, 9, 11
_ATTRIBUTE_INT = 2


class InvalidGraph(ValueError):
    """The bytes are not an ONNX model with the backbone's output."""

    code = "invalid_graph"


def append_head(
    backbone_onnx: bytes, head: Head, metadata: Mapping[str, str], silence: Silence | None = None
) -> bytes:
    """The backbone's model with the head behind it, from the backbone's inputs to decisions.

    Outputs: PROBABILITIES float32 (batch, labels), or VALUES float64 (batch,) for regression; of multilabel
    ASSIGNED and UNCERTAIN bool (batch, labels); ABSTAINED bool (batch,) and DISTANCE float32 (batch,), all as
    in Predictions. silence: the tokens that say nothing, of a text backbone; an input of only these is
    abstained from. metadata is added to the model's metadata_props, with the labels as JSON under "labels",
    and the numbers by which it decides; see _decisions_of. Raises InvalidGraph.
    """
    fields = list(_fields(backbone_onnx))
    graphs = [content for number, _, content in fields if number == _MODEL_GRAPH]
    if len(graphs) != 1 or OUTPUT_NAME.encode() not in graphs[0]:
        raise InvalidGraph(
            f"The backbone is no ONNX model with an output called {OUTPUT_NAME!r}; export it again."
        )
    kept = [whole for number, whole, _ in _fields(graphs[0]) if number != _GRAPH_OUTPUT]
    rest = [whole for number, whole, _ in fields if number != _MODEL_GRAPH]
    entries = {**metadata, "labels": json.dumps(head.labels, ensure_ascii=False), **_decisions_of(head)}
    return b"".join(
        [
            *rest,
            _message(_MODEL_GRAPH, *kept, *_Appended(head, silence).fields),
            *(
                _message(_MODEL_METADATA, _text(1, key), _text(2, value))
                for key, value in sorted(entries.items())
            ),
        ]
    )


def _decisions_of(head: Head) -> dict[str, str]:
    """The numbers by which Head.predict decides, as JSON by key.

    measured: false abstains always. threshold: the probability of the top label of a classification under
    which it abstains. decisions: the probability from which each label of a multilabel head is given.
    certain: the confidence from which these decisions can be relied on, the probability of labels given, one
    minus it for those not given.
    """
    facts: dict[str, object] = {"measured": head.measured}
    if head.task == "classification":
        facts["threshold"] = head.threshold
    elif head.task == "multilabel":
        facts["decisions"] = head.decisions.tolist()
        facts["certain"] = dict(zip(("given", "not_given"), head.certain, strict=True))
    return {key: json.dumps(value) for key, value in facts.items()}


class _Appended:
    """The graph's new fields: nodes, initializers and outputs. They compute what Head.predict does."""

    def __init__(self, head: Head, silence: Silence | None) -> None:
        self.fields: list[bytes] = []
        self._head = head
        logits = self._logits()
        if head.task == "regression":
            self._values(logits)
            doubts = []
        else:
            probabilities = self._probabilities(logits)
            multilabel = head.task == "multilabel"
            confidence = (
                self._multilabel(probabilities)
                if multilabel
                else self._node("ReduceMax", probabilities, self._ints(1), keepdims=0)
            )
            doubts = [self._node("Less", confidence, self._floats(head.threshold))]
        self._distance(head.region)
        # A distance is never below zero: without measurements every one is too far.
        doubts.append(self._node("Greater", DISTANCE, self._floats(1.0 if head.measured else -1.0)))
        if silence is not None and silence.tokens:
            doubts.append(self._silent(silence))
        self._abstained(doubts)

    def _logits(self) -> str:
        weight, bias = _folded(self._head)
        source = OUTPUT_NAME
        if self._head.scaling.transform == "sqrt":
            source = self._node("Sqrt", self._node("Relu", source))
        return self._node("Gemm", source, self._tensor(weight), self._tensor(bias), transB=1)

    def _values(self, logits: str) -> None:
        flat = self._node("Reshape", logits, self._ints(-1))
        # In double precision: targets far from zero keep their differences.
        double = self._node("Cast", flat, to=_DOUBLE)
        scaled = self._node("Mul", double, self._tensor(np.array(self._head.value_scale)))
        self._node("Add", scaled, self._tensor(np.array(self._head.value_mean)), output=VALUES)
        self._give(VALUES, None, _DOUBLE)

    def _probabilities(self, logits: str) -> str:
        head, multilabel = self._head, self._head.task == "multilabel"
        sharp = PROBABILITIES if not head.smoothing else None
        found = (
            self._node("Sigmoid", logits, output=sharp)
            if multilabel
            else self._node("Softmax", logits, output=sharp, axis=-1)
        )
        if head.smoothing:
            scaled = self._node("Mul", found, self._floats(1.0 - head.smoothing))
            spread = self._floats(head.smoothing / (2 if multilabel else len(head.labels)))
            self._node("Add", scaled, spread, output=PROBABILITIES)
        self._give(PROBABILITIES, len(head.labels), _FLOAT)
        return PROBABILITIES

    def _multilabel(self, probabilities: str) -> str:
        """Decisions label by label; the confidence of the least certain one."""
        head = self._head
        given, not_given = (self._floats(value) for value in head.certain)
        self._node("GreaterOrEqual", probabilities, self._tensor(head.decisions), output=ASSIGNED)
        against = self._node("Sub", self._floats(1.0), probabilities)
        certainty = self._node("Where", ASSIGNED, probabilities, against)
        wanted = self._node("Where", ASSIGNED, given, not_given)
        self._node("Less", certainty, wanted, output=f"{_PREFIX}doubtful")
        self._give(ASSIGNED, len(head.labels), _BOOL)
        return self._node("ReduceMin", certainty, self._ints(1), keepdims=0)

    def _distance(self, region: Region | None) -> None:
        """See Region.squared_distance; without a region it is zero."""
        self._give(DISTANCE, None, _FLOAT)
        if region is None:
            rows = self._node("Shape", OUTPUT_NAME, start=0, end=1)
            self._node("ConstantOfShape", rows, output=DISTANCE)
            return
        axis, zero = self._ints(1), self._floats(0.0)
        centred = self._node("Sub", OUTPUT_NAME, self._tensor(region.mean))
        lengths = self._node("ReduceSumSquare", centred, axis, keepdims=0)
        directions = region.directions.astype(np.float32) * region.steps[:, None]
        along = self._node("MatMul", centred, self._tensor(np.ascontiguousarray(directions.T)))
        inside = self._node("Mul", along, self._tensor(region.plain))
        covered = self._node("ReduceSumSquare", inside, axis, keepdims=0)
        left = self._node("Max", self._node("Sub", lengths, covered), zero)
        outside = self._node("Div", left, self._floats(region.rest))
        doubled = self._tensor(np.ascontiguousarray(-2.0 * region.centres.T))
        own = self._tensor((region.centres**2).sum(axis=1))
        apart = self._node("Add", self._node("MatMul", along, doubled), own)
        lowest = self._node("ReduceMin", apart, axis, keepdims=0)
        origin = self._node("ReduceSumSquare", along, axis, keepdims=0)
        near = self._node("Max", self._node("Add", origin, lowest), zero)
        squared = self._node("Add", near, outside)
        share = self._node("Div", squared, self._floats(region.limit))
        self._node("Sqrt", share, output=DISTANCE)

    def _silent(self, silence: Silence) -> str:
        """Whether no token of a text, prompt and padding aside, says anything."""
        ids, mask = IDS, MASK
        if silence.skipped:
            bounds = (self._ints(silence.skipped), self._ints(np.iinfo(np.int64).max), self._ints(1))
            ids, mask = self._node("Slice", IDS, *bounds), self._node("Slice", MASK, *bounds)
        each = self._node("Unsqueeze", ids, self._ints(2))
        found = self._node("Cast", self._node("Equal", each, self._ints(*silence.tokens)), to=_INT64)
        silent = self._node("Mul", mask, self._node("ReduceSum", found, self._ints(2), keepdims=0))
        says = self._node("ReduceSum", self._node("Sub", mask, silent), self._ints(1), keepdims=0)
        return self._node("Equal", says, self._ints(0))

    def _abstained(self, doubts: list[str]) -> None:
        """Any of the doubts; for multilabel also where every decision is uncertain, and so these are."""
        multilabel = self._head.task == "multilabel"
        reasons = doubts[0]
        for place, doubt in enumerate(doubts[1:], start=2):
            last = place == len(doubts) and not multilabel
            reasons = self._node("Or", reasons, doubt, output=ABSTAINED if last else None)
        if len(doubts) == 1 and not multilabel:
            self._node("Identity", reasons, output=ABSTAINED)
        if multilabel:
            everywhere = self._node("Unsqueeze", reasons, self._ints(1))
            self._node("Or", f"{_PREFIX}doubtful", everywhere, output=UNCERTAIN)
            self._give(UNCERTAIN, len(self._head.labels), _BOOL)
            counted = self._node("Cast", UNCERTAIN, to=_INT64)
            fewest = self._node("ReduceMin", counted, self._ints(1), keepdims=0)
            self._node("Cast", fewest, output=ABSTAINED, to=_BOOL)
        self._give(ABSTAINED, None, _BOOL)

    def _node(self, operator: str, *inputs: str, output: str | None = None, **attributes: int) -> str:
        """The name of its output."""
        name = output or self._name()
        self.fields.append(
            _message(
                _GRAPH_NODE,
                *(_text(1, one) for one in inputs),
                _text(2, name),
                _text(3, name),
                _text(4, operator),
                *(
                    _message(5, _text(1, key), _number(3, value), _number(20, _ATTRIBUTE_INT))
                    for key, value in attributes.items()
                ),
            )
        )
        return name

    def _tensor(self, values: NDArray[Any]) -> str:
        name = self._name()
        kind = {"f4": _FLOAT, "f8": _DOUBLE, "i8": _INT64}[values.dtype.str[1:]]
        little = values.astype(values.dtype.newbyteorder("<"))
        self.fields.append(
            _message(
                _GRAPH_INITIALIZER,
                *(_number(1, size) for size in values.shape),
                _number(2, kind),
                _text(8, name),
                _message(9, little.tobytes()),
            )
        )
        return name

    def _floats(self, value: float) -> str:
        return self._tensor(np.array(value, dtype=np.float32))

    def _ints(self, *values: int) -> str:
        return self._tensor(np.array(values, dtype=np.int64))

    def _give(self, name: str, columns: int | None, kind: int) -> None:
        """An output (batch,) or (batch, columns) of that kind."""
        shape = _message(1, _text(2, "batch"))
        if columns is not None:
            shape += _message(1, _number(1, columns))
        tensor = _number(1, kind) + _message(2, shape)
        self.fields.append(_message(_GRAPH_OUTPUT, _text(1, name), _message(2, _message(1, tensor))))

    def _name(self) -> str:
        return f"{_PREFIX}{len(self.fields)}"


def _folded(head: Head) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight and bias with scaling and temperature in them."""
    unit = 1.0 / head.temperature
    weight = head.weight.astype(np.float64) * (unit / head.scaling.scale)
    bias = head.bias.astype(np.float64) * unit - weight @ head.scaling.mean.astype(np.float64)
    return weight.astype(np.float32), bias.astype(np.float32)


def _fields(message: bytes) -> Iterator[tuple[int, memoryview, bytes]]:
    """(number, the whole field, its content if it has a length) of every field of a message."""
    view = memoryview(message)
    place = 0
    while place < len(message):
        begin = place
        tag, place = _read_varint(message, place)
        content = b""
        kind = tag & 7
        if kind == _VARINT:
            _, place = _read_varint(message, place)
        elif kind == _BYTES:
            length, place = _read_varint(message, place)
            # Only the graph is looked into: everything else is passed on as it is.
            content = bytes(view[place : place + length]) if tag >> 3 == _MODEL_GRAPH else b""
            place += length
        elif kind in (_FIXED64, _FIXED32):
            place += 8 if kind == _FIXED64 else 4
        else:
            raise InvalidGraph("The backbone is not an ONNX model; export it again.")
        if place > len(message):
            raise InvalidGraph("The backbone's ONNX file is cut short; export it again.")
        yield tag >> 3, view[begin:place], content


def _read_varint(message: bytes, place: int) -> tuple[int, int]:
    value, shift = 0, 0
    while place < len(message) and shift < 64:
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise InvalidGraph("The backbone's ONNX file is cut short; export it again.")


def _varint(value: int) -> bytes:
    # Negative numbers are written as their 64-bit two's complement.
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode("utf-8"))


def _message(field: int, *parts: bytes | memoryview) -> bytes:
    return b"".join([_varint(field << 3 | _BYTES), _varint(sum(len(part) for part in parts)), *parts])
