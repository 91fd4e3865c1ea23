"""Type aliases for numpy arrays, by element type."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]
# One preprocessed input. Image: uint8 (size, size, 3). Text: int64 (tokens,).
Prepared = NDArray[Any]
