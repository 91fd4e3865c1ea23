"""Messages between the service and the process that fits, over its pipes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

_FRAME: Final = struct.Struct("<QQ")  # length of the header and of the arrays, in bytes
Frame = tuple[dict[str, Any], list[NDArray[Any]]]


def write_frame(pipe: IO[bytes], header: Mapping[str, Any], arrays: Sequence[NDArray[Any]]) -> None:
    """Write a header and arrays as one frame, and flush. Raises OSError if the other end is closed."""
    described = {**header, "arrays": [[array.dtype.str, array.shape] for array in arrays]}
    text = json.dumps(described).encode()
    pipe.write(_FRAME.pack(len(text), sum(array.nbytes for array in arrays)))
    pipe.write(text)
    for array in arrays:
        pipe.write(array.data.cast("B") if array.size else b"")
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> Frame | None:
    """Read a header and its arrays; return None at the end of the pipe."""
    sizes = pipe.read(_FRAME.size)
    if len(sizes) < _FRAME.size:
        return None
    text_size, _ = _FRAME.unpack(sizes)
    text = pipe.read(text_size)
    if len(text) < text_size:
        return None
    header: dict[str, Any] = json.loads(text)
    arrays: list[NDArray[Any]] = []
    for dtype, shape in header.pop("arrays"):
        array = np.empty(shape, dtype=dtype)
        if array.size:
            view, filled = array.data.cast("B"), 0
            while filled < len(view):
                got = pipe.readinto(view[filled:])  # type: ignore[attr-defined]
                if not got:
                    return None
                filled += got
        arrays.append(array)
    return header, arrays
