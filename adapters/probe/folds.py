"""Deals examples into folds by their content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set

import numpy as np

from adapters.examples.target import Target, labels_of
from models.arrays import Integers


def folds(digests: Sequence[str], targets: Sequence[Target], k: int) -> Integers:
    """Return stratified folds, int64 (n,) in 0..k-1; -1 for rows that must always be trained on.

    `digests`: of the inputs, or the keys of groups of them (see copies.together). Rows with the same digest
    share a fold, so no copy of a held-out input is trained on. The inputs of every label are dealt over the
    folds as evenly as possible, and so are all inputs; numbers are dealt in order of size. If inputs have one
    label each, the only input of a label is never held out (-1): without it the label could not be predicted.
    The result depends only on the (digest, target) pairs, not on their order. k >= 2.
    """
    rows_of: dict[str, list[int]] = {}
    for row, digest in enumerate(digests):
        rows_of.setdefault(digest, []).append(row)
    if targets and isinstance(targets[0], float | int):
        dealt = _by_size(
            {digest: float(np.mean([targets[row] for row in rows])) for digest, rows in rows_of.items()}, k
        )
    else:
        labels = {
            digest: {label for row in rows for label in labels_of(targets[row])}
            for digest, rows in rows_of.items()
        }
        dealt = _by_label(labels, alone=any(isinstance(target, tuple) for target in targets))
    result = np.full(len(digests), -1, dtype=np.int64)
    for place, digest in enumerate(dealt):
        result[rows_of[digest]] = place % k
    return result


def _by_label(labels: Mapping[str, Set[str]], *, alone: bool) -> list[str]:
    """Return digests sorted by the rarest label of each. `alone`: include the only holder of a label."""
    holders = Counter(label for own in labels.values() for label in own)
    # Examples without labels are a stratum of their own.
    rarest = {
        digest: min(((holders[label], label) for label in own), default=(len(labels), ""))
        for digest, own in labels.items()
    }
    return sorted(
        (digest for digest, (count, _) in rarest.items() if alone or count > 1),
        key=lambda d: (rarest[d][1], d),
    )


def _by_size(values: Mapping[str, float], k: int) -> list[str]:
    """Return digests in order of their values, shuffled by digest within every k neighbours."""
    ordered = sorted(values, key=lambda digest: (values[digest], digest))
    return [digest for begin in range(0, len(ordered), k) for digest in sorted(ordered[begin : begin + k])]
