"""Which examples belong together: equal inputs, near copies, and what the tenant says is one thing."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapters.examples.target import Target
from models.arrays import Bools, Floats

Rows = NDArray[np.int64]

# Two inputs are near copies if they lie this much nearer to each other than to their square-root-of-n-th
# neighbours, or if each is the other's nearest and clearly nearer than the next (measured on texts with
# signatures or misspellings and on pictures encoded again: most are found, and 0 to 4 % of 1,000 distinct
# inputs are taken for copies, more among emoji of which many are variants of one).
_NEAR = 0.5
_CLEARLY_NEARER = 0.8
# In units of the usual distance to such a neighbour: no neighbourhood is tighter; what is nearer is equal.
_TIGHTEST = 0.5
_EQUAL = 1e-3
# The neighbourhood of a row is measured on so many others, the pivots. Up to so many rows all pairs are
# compared, of more only those that have one of their two nearest pivots in common.
_PIVOTS = 256
_MOST_COMPARED = 1024


@dataclass(frozen=True, slots=True)
class Together:
    """Groups of examples that never judge each other.

    keys: n, the same for examples of one group: the smallest digest in it. near_copies: how many distinct
    inputs are near copies of another one, the first of each counted out.
    """

    keys: tuple[str, ...]
    near_copies: int


def together(embeddings: Floats, digests: Sequence[str], groups: Sequence[str] = ()) -> Together:
    """The groups of examples with these embeddings, float32 (n, dim); groups: n, "" for none, or empty.

    Rows are in an order that depends on what they hold only, and then so do the groups.
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
    """The keys of groups, where an example that was chosen for being wrong is in the group that misled it.

    embeddings: float32 (n, dim). sampled: (n,), False for what was chosen for being wrong: what misled it is
    the nearest sampled example with another target, for numbers one that is a standard deviation away. It
    would not be there without that one, and must not stay when that one is held out: else what is learned
    from corrections alone is reported 5 to 17 points too low.
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
        # Where all are alike, the nearest of all has to do.
        squared[alike & ~alike.all(axis=1, keepdims=True)] = np.inf
        for row, place in zip(some.tolist(), squared.argmin(axis=1).tolist(), strict=True):
            found[row] = keys[judged[place]]
    return found


def _as_numbers(targets: Sequence[Target]) -> tuple[NDArray[np.float64], float]:
    """Targets as numbers (n,), and the difference from which on two are different."""
    if isinstance(targets[0], float):
        values = np.array(targets, dtype=np.float64)
        return values, float(values.std())
    places = {target: place for place, target in enumerate(dict.fromkeys(targets))}
    return np.array([places[target] for target in targets], dtype=np.float64), 1.0


class _Forest:
    """Disjoint sets of rows."""

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
        """Rows of one name are joined; an empty name is none."""
        first: dict[Hashable, int] = {}
        for row, name in enumerate(names):
            if name:
                self.join(row, first.setdefault(name, row))


def _near_pairs(embeddings: Floats) -> Iterator[tuple[int, int]]:
    """Pairs of rows, float32 (n, dim), that are near copies."""
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
    """How far each neighbourhood reaches, from the squared distance to its edge, and what counts as equal."""
    reach = np.sqrt(squared)
    usual = float(np.median(reach))
    return np.maximum(reach, np.float32(_TIGHTEST * usual)), _EQUAL * usual


def _near_among(squared: Floats, names: Rows, reach: Floats, equal: float) -> Iterator[tuple[int, int]]:
    """The near pairs, at least once each, among rows with these squared distances, which are overwritten."""
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
    """(some, others), of rows around the mean of all."""
    squared = some @ others.T
    squared *= -2.0
    squared += np.einsum("ij,ij->i", some, some)[:, None]
    squared += np.einsum("ij,ij->i", others, others)
    result: Floats = np.maximum(squared, 0.0, out=squared)
    return result
