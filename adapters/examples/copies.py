"""Groups of examples: equal inputs, near copies, and the groups that the tenant names."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from adapters.examples.target import Target
from models.arrays import Bools, Doubles, Floats, Integers

# Two inputs are near copies if they are much nearer to each other than to their square-root-of-n-th
# neighbours, or if they are mutual nearest neighbours and clearly nearer than the second nearest. Measured on
# texts with signatures or misspellings and on re-encoded images: most copies are found, and 0 to 4 % of 1,000
# distinct inputs are taken for copies, more among emoji, many of which are variants of one.
_NEAR = 0.5  # share of the distance to the square-root-of-n-th neighbour
_CLEARLY_NEARER = 0.8  # share of the distance to the second nearest neighbour
# Two limits in units of the median distance to the square-root-of-n-th neighbour.
_TIGHTEST = 0.5  # smallest radius of a neighbourhood
_EQUAL = 1e-3  # distance up to which inputs are equal
_PIVOTS = 256  # rows, or the square root of n if more, on which the neighbourhood of each row is measured
_MOST_COMPARED = 1024  # rows; above this, only pairs that share one of their two nearest pivots are compared


@dataclass(frozen=True, slots=True)
class Together:
    """Groups of examples that are held out together, so that none is used to evaluate another."""

    keys: tuple[str, ...]  # (n,), the smallest digest in the group of each example
    near_copies: int  # distinct inputs that are near copies of another, without the first of each set


def together(embeddings: Floats, digests: Sequence[str], groups: Sequence[str] = ()) -> Together:
    """Group the examples with these embeddings, float32 (n, dim). `groups`: n, "" for none, or empty.

    The order of rows must depend on their content only; the groups then do too.
    """
    first: dict[str, int] = {}
    for row, digest in enumerate(digests):
        first.setdefault(digest, row)
    distinct = np.fromiter(first.values(), np.int64, len(first))
    forest = _Forest(len(digests))
    for one, other in _near_pairs(embeddings[distinct]):
        forest.join(int(distinct[one]), int(distinct[other]))
    near_copies = len(distinct) - len({forest.root(row) for row in distinct.tolist()})
    forest.join_named(digests)
    forest.join_named(groups)
    smallest: dict[int, str] = {}
    for row, digest in enumerate(digests):
        own = forest.root(row)
        smallest[own] = min(digest, smallest.get(own, digest))
    return Together(tuple(smallest[forest.root(row)] for row in range(len(digests))), near_copies)


def with_misled(
    keys: Sequence[str], embeddings: Floats, targets: Sequence[Target], sampled: Bools
) -> list[str]:
    """Return the group keys after moving each correction into the group of the example that misled the model.

    `embeddings`: float32 (n, dim). `sampled`: (n,), False for corrections, which were chosen for being wrong.
    The misleading example is the nearest sampled one with another target (for numbers, one that is a standard
    deviation away). The correction exists because of it and must be held out with it: otherwise what is
    learned from corrections alone is reported 5 to 17 points too low.
    """
    found = list(keys)
    judged, chosen = np.flatnonzero(sampled), np.flatnonzero(~sampled)
    if not len(judged) or not len(chosen):
        return found
    centre = embeddings[judged].mean(axis=0)
    there = embeddings[judged] - centre
    numbers, apart = _as_numbers(targets)
    for begin in range(0, len(chosen), _MOST_COMPARED):
        some = chosen[begin : begin + _MOST_COMPARED]
        squared = _squared_distances(embeddings[some] - centre, there)
        alike = np.abs(numbers[some][:, None] - numbers[judged]) < apart
        # If all targets are alike, the nearest example is taken.
        squared[alike & ~alike.all(axis=1, keepdims=True)] = np.inf
        for row, place in zip(some.tolist(), squared.argmin(axis=1).tolist(), strict=True):
            found[row] = keys[judged[place]]
    return found


def _as_numbers(targets: Sequence[Target]) -> tuple[Doubles, float]:
    """Targets as numbers (n,), and the smallest difference at which two count as different."""
    if isinstance(targets[0], float):
        values = np.array(targets, dtype=np.float64)
        return values, float(values.std())
    places = {target: place for place, target in enumerate(dict.fromkeys(targets))}
    return np.array([places[target] for target in targets], dtype=np.float64), 1.0


class _Forest:
    """Disjoint sets of rows (union-find)."""

    def __init__(self, size: int) -> None:
        self._parents = list(range(size))

    def root(self, row: int) -> int:
        while self._parents[row] != row:
            self._parents[row] = self._parents[self._parents[row]]
            row = self._parents[row]
        return row

    def join(self, one: int, other: int) -> None:
        self._parents[self.root(one)] = self.root(other)

    def join_named(self, names: Iterable[Hashable]) -> None:
        """Join the rows that share a name; an empty name joins none."""
        first: dict[Hashable, int] = {}
        for row, name in enumerate(names):
            if name:
                self.join(row, first.setdefault(name, row))


def _near_pairs(embeddings: Floats) -> Iterator[tuple[int, int]]:
    """Yield the pairs of rows, float32 (n, dim), that are near copies."""
    n = len(embeddings)
    if n < 3:
        return
    rows = embeddings - embeddings.mean(axis=0)
    pivots = np.unique(np.linspace(0, n - 1, max(_PIVOTS, math.isqrt(n)), dtype=np.int64))
    rank = min(max(2, round(len(pivots) / math.sqrt(n))), len(pivots) - 1)
    if n <= _MOST_COMPARED:
        squared = _squared_distances(rows, rows)
        reach, equal = _reach(np.partition(squared[:, pivots], rank, axis=1)[:, rank])
        yield from _near_among(squared, np.arange(n), reach, equal)
        return
    to_pivots = _squared_distances(rows, rows[pivots])
    nearest = np.argpartition(to_pivots, (1, rank), axis=1)
    reach, equal = _reach(to_pivots[np.arange(n), nearest[:, rank]])
    owners = nearest[:, :2].ravel()
    by_pivot = np.argsort(owners, kind="stable")
    for some in np.split(by_pivot // 2, np.cumsum(np.bincount(owners, minlength=len(pivots)))[:-1]):
        yield from _near_among(_squared_distances(rows[some], rows[some]), some, reach[some], equal)


def _reach(squared: Floats) -> tuple[Floats, float]:
    """Radii of neighbourhoods from squared distances to their edges, and the distance counted as equal."""
    reach = np.sqrt(squared)
    usual = float(np.median(reach))
    return np.maximum(reach, np.float32(_TIGHTEST * usual)), _EQUAL * usual


def _near_among(squared: Floats, names: Integers, reach: Floats, equal: float) -> Iterator[tuple[int, int]]:
    """Yield each near pair at least once. `squared`: distances between the rows; they are overwritten."""
    n = len(squared)
    if n < 2:
        return
    np.fill_diagonal(squared, np.inf)
    near = squared <= np.maximum(np.float32(_NEAR**2) * reach[:, None] * reach, np.float32(equal**2))
    for one, other in np.argwhere(near).tolist():
        yield int(names[one]), int(names[other])
    if n < 3:
        return
    every = np.arange(n)
    nearest = squared.argmin(axis=1)
    first = squared[every, nearest]
    squared[every, nearest] = np.inf
    second = squared.min(axis=1)
    clearly = first < _CLEARLY_NEARER**2 * np.minimum(second, second[nearest])
    for one in np.flatnonzero(clearly & (nearest[nearest] == every)).tolist():
        yield int(names[one]), int(names[nearest[one]])


def _squared_distances(some: Floats, others: Floats) -> Floats:
    """Squared distances (some, others) between rows centred on the mean of all."""
    squared = some @ others.T
    squared *= -2.0
    squared += np.einsum("ij,ij->i", some, some)[:, None]
    squared += np.einsum("ij,ij->i", others, others)
    result: Floats = np.maximum(squared, 0.0, out=squared)
    return result
