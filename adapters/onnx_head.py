"""Appends a head's nodes to an exported backbone: one self-contained ONNX file, without the onnx package.

An ONNX file is a protobuf message, and messages are lists of fields in any order: what is added to a graph
can be written behind what is there. Only the graph's outputs are replaced. Field numbers are those of
onnx.proto3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from adapters.head import Head
from models.spec import OUTPUT_NAME

PROBABILITIES = "probabilities"
VALUES = "values"

_PREFIX = "topwork_head_"

_MODEL_GRAPH, _MODEL_METADATA = 7, 14
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_OUTPUT = 1, 5, 12
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FLOAT, _INT64, _DOUBLE = 1, 7, 11
_ATTRIBUTE_INT = 2


class InvalidGraph(ValueError):
    """The bytes are not an ONNX model with the backbone's output."""

    code = "invalid_graph"


def append_head(backbone_onnx: bytes, head: Head, metadata: Mapping[str, str]) -> bytes:
    """The backbone's model with the head behind it, from the backbone's inputs to probabilities.

    The output is PROBABILITIES float32 (batch, labels), or VALUES float64 (batch,) for regression. metadata
    is added to the model's metadata_props, with the labels as JSON under "labels", and how the service makes
    answers of the outputs; see _decisions_of. The distance from the examples is not part of it. Raises
    InvalidGraph.
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
            _message(_MODEL_GRAPH, *kept, *_head_nodes(head)),
            *(
                _message(_MODEL_METADATA, _text(1, key), _text(2, value))
                for key, value in sorted(entries.items())
            ),
        ]
    )


def _decisions_of(head: Head) -> dict[str, str]:
    """How Head.predict decides, as JSON by key.

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


def _head_nodes(head: Head) -> Iterator[bytes]:
    """The graph's new fields: nodes, initializers and the output."""
    weight, bias = _folded(head)
    source = OUTPUT_NAME
    if head.scaling.transform == "sqrt":
        yield _node("Relu", [source], f"{_PREFIX}positive")
        yield _node("Sqrt", [f"{_PREFIX}positive"], f"{_PREFIX}root")
        source = f"{_PREFIX}root"
    yield _tensor(f"{_PREFIX}weight", weight)
    yield _tensor(f"{_PREFIX}bias", bias)
    logits = f"{_PREFIX}logits"
    yield _node("Gemm", [source, f"{_PREFIX}weight", f"{_PREFIX}bias"], logits, transB=1)
    if head.task == "regression":
        yield _tensor(f"{_PREFIX}shape", np.array([-1], dtype=np.int64))
        yield _node("Reshape", [logits, f"{_PREFIX}shape"], f"{_PREFIX}flat")
        # In double precision: targets far from zero keep their differences.
        yield _node("Cast", [f"{_PREFIX}flat"], f"{_PREFIX}double", to=_DOUBLE)
        yield _tensor(f"{_PREFIX}unit", np.array(head.value_scale))
        yield _tensor(f"{_PREFIX}origin", np.array(head.value_mean))
        yield _node("Mul", [f"{_PREFIX}double", f"{_PREFIX}unit"], f"{_PREFIX}scaled")
        yield _node("Add", [f"{_PREFIX}scaled", f"{_PREFIX}origin"], VALUES)
        yield _output(VALUES, None, _DOUBLE)
        return
    multilabel = head.task == "multilabel"
    sharp = f"{_PREFIX}sharp" if head.smoothing else PROBABILITIES
    if multilabel:
        yield _node("Sigmoid", [logits], sharp)
    else:
        yield _node("Softmax", [logits], sharp, axis=-1)
    if head.smoothing:
        outcomes = 2 if multilabel else len(head.labels)
        kept, spread = f"{_PREFIX}kept", f"{_PREFIX}spread"
        yield _tensor(kept, np.array(1.0 - head.smoothing, dtype=np.float32))
        yield _tensor(spread, np.array(head.smoothing / outcomes, dtype=np.float32))
        yield _node("Mul", [sharp, kept], f"{_PREFIX}scaled")
        yield _node("Add", [f"{_PREFIX}scaled", spread], PROBABILITIES)
    yield _output(PROBABILITIES, len(head.labels))


def _folded(head: Head) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight and bias with scaling and temperature in them."""
    unit = 1.0 / head.temperature
    weight = head.weight.astype(np.float64) * (unit / head.scaling.scale)
    bias = head.bias.astype(np.float64) * unit - weight @ head.scaling.mean.astype(np.float64)
    return weight.astype(np.float32), bias.astype(np.float32)


def _node(operator: str, inputs: list[str], output: str, **attributes: int) -> bytes:
    return _message(
        _GRAPH_NODE,
        *(_text(1, name) for name in inputs),
        _text(2, output),
        _text(3, output),
        _text(4, operator),
        *(
            _message(5, _text(1, name), _number(3, value), _number(20, _ATTRIBUTE_INT))
            for name, value in attributes.items()
        ),
    )


def _tensor(name: str, values: NDArray[np.float32] | NDArray[np.float64] | NDArray[np.int64]) -> bytes:
    kind = {"f4": _FLOAT, "f8": _DOUBLE, "i8": _INT64}[values.dtype.str[1:]]
    little = values.astype(values.dtype.newbyteorder("<"))
    return _message(
        _GRAPH_INITIALIZER,
        *(_number(1, size) for size in values.shape),
        _number(2, kind),
        _text(8, name),
        _message(9, little.tobytes()),
    )


def _output(name: str, columns: int | None, kind: int = _FLOAT) -> bytes:
    """A ValueInfoProto: (batch,) or (batch, columns) of that kind of number."""
    shape = _message(1, _text(2, "batch")) + (b"" if columns is None else _message(1, _number(1, columns)))
    tensor = _number(1, kind) + _message(2, shape)
    return _message(_GRAPH_OUTPUT, _text(1, name), _message(2, _message(1, tensor)))


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
