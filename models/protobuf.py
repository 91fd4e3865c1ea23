"""Reading and writing protobuf messages field by field, to extend an ONNX graph without the onnx package.

An ONNX file is a protobuf message, and the fields of a message may be in any order, so new fields can be
written before or after the existing ones. Field numbers are those of onnx.proto3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from models.errors import InternalFailure

MODEL_GRAPH, MODEL_METADATA = 7, 14
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT = 1, 5, 11, 12
FLOAT, UINT8, INT64, BOOL, DOUBLE = 1, 2, 7, 9, 11

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_ATTRIBUTE_INT, _ATTRIBUTE_INTS = 2, 7
_TYPES = {"f4": FLOAT, "f8": DOUBLE, "i8": INT64}


class InvalidGraph(InternalFailure):
    """The bytes are not an ONNX model with the inputs and the output of a backbone."""

    code = "invalid_graph"


def fields(message: bytes | memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Yield (number, whole field, content) for every field of a message. Raises InvalidGraph.

    The content is empty unless the field is length-delimited.
    """
    view = memoryview(message)
    place = 0
    while place < len(view):
        begin = place
        tag, place = _read_varint(view, place)
        content = view[:0]
        kind = tag & 7
        if kind == _VARINT:
            _, place = _read_varint(view, place)
        elif kind == _BYTES:
            length, place = _read_varint(view, place)
            content = view[place : place + length]
            place += length
        elif kind in (_FIXED64, _FIXED32):
            place += 8 if kind == _FIXED64 else 4
        else:
            raise InvalidGraph("The backbone is not an ONNX model. Export it again.")
        if place > len(view):
            raise InvalidGraph("The backbone's ONNX file is truncated. Export it again.")
        yield tag >> 3, view[begin:place], content


def graph_of(model: bytes) -> tuple[memoryview, list[memoryview]]:
    """Return a model's graph, and its other fields unchanged. Raises InvalidGraph."""
    graphs, rest = [], []
    for number, whole, content in fields(model):
        if number == MODEL_GRAPH:
            graphs.append(content)
        else:
            rest.append(whole)
    if len(graphs) != 1:
        raise InvalidGraph("The backbone is not an ONNX model. Export it again.")
    return graphs[0], rest


def name_of(value: memoryview) -> str:
    """The name of a graph's input or output. Raises InvalidGraph."""
    return next((bytes(content).decode() for number, _, content in fields(value) if number == 1), "")


def message(field: int, *parts: bytes | memoryview) -> bytes:
    """A length-delimited field that holds the concatenated parts."""
    return b"".join([_varint(field << 3 | _BYTES), _varint(sum(len(part) for part in parts)), *parts])


def text(field: int, value: str) -> bytes:
    """A string field."""
    return message(field, value.encode("utf-8"))


def number(field: int, value: int) -> bytes:
    """An integer field."""
    return _varint(field << 3 | _VARINT) + _varint(value)


def node(operator: str, inputs: tuple[str, ...], output: str, **attributes: int | tuple[int, ...]) -> bytes:
    """A graph field with a node that has one output; the node is named after that output."""
    return message(
        GRAPH_NODE,
        *(text(1, one) for one in inputs),
        text(2, output),
        text(3, output),
        text(4, operator),
        *(message(5, text(1, key), *_attribute(value)) for key, value in attributes.items()),
    )


def constant(name: str, values: NDArray[Any]) -> bytes:
    """A graph field with a constant: float32, float64 or int64."""
    little = values.astype(values.dtype.newbyteorder("<"))
    return message(
        GRAPH_INITIALIZER,
        *(number(1, size) for size in values.shape),
        number(2, _TYPES[values.dtype.str[1:]]),
        text(8, name),
        message(9, little.tobytes()),
    )


def tensor(field: int, name: str, kind: int, *sizes: int | str) -> bytes:
    """A graph field with an input or an output. `sizes`: a name stands for a dynamic dimension."""
    dimensions = [message(1, text(2, size) if isinstance(size, str) else number(1, size)) for size in sizes]
    described = number(1, kind) + message(2, *dimensions)
    return message(field, text(1, name), message(2, message(1, described)))


def _attribute(value: int | tuple[int, ...]) -> list[bytes]:
    if isinstance(value, int):
        return [number(3, value), number(20, _ATTRIBUTE_INT)]
    return [*(number(8, one) for one in value), number(20, _ATTRIBUTE_INTS)]


def _read_varint(view: memoryview, place: int) -> tuple[int, int]:
    value, shift = 0, 0
    while place < len(view) and shift < 64:
        byte = view[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise InvalidGraph("The backbone's ONNX file is truncated. Export it again.")


def _varint(value: int) -> bytes:
    # Negative numbers are encoded as 64-bit two's complement.
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
