"""Embeddings as backbones give them, in small: seeded clouds, one for each label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adapters.examples.target import Target
from adapters.probe.fit import Dataset
from models.arrays import Floats


def clouds(
    n: int, dim: int, labels: int, *, apart: float = 2.0, seed: int = 0, shift: float = 0.0
) -> tuple[Floats, list[str]]:
    """n points around one centre for each label; apart: distance of centres in standard deviations."""
    centres = np.random.default_rng(1000 + labels).standard_normal((labels, dim)) * apart / np.sqrt(2 * dim)
    generator = np.random.default_rng(seed)
    own = np.arange(n) % labels
    rows = centres[own] + generator.standard_normal((n, dim)) * 0.5 + shift
    return rows.astype(np.float32), [f"label {label}" for label in own]


def classification(
    n: int = 120, dim: int = 32, labels: int = 3, *, apart: float = 3.0, seed: int = 0
) -> Dataset:
    """A classification of clouds, every input distinct."""
    rows, names = clouds(n, dim, labels, apart=apart, seed=seed)
    return dataset(rows, names)


def dataset(rows: Floats, targets: Sequence[Target], task: str = "classification") -> Dataset:
    """The rows as a dataset for a made-up backbone, with a digest for each row."""
    digests = [f"{row:064x}" for row in range(len(rows))]
    return Dataset(rows, list(targets), digests, task, "a fingerprint")  # type: ignore[arg-type]


def permuted(data: Dataset, order: NDArray[np.int64]) -> Dataset:
    """The same examples in another order."""
    return Dataset(
        data.embeddings[order],
        [data.targets[row] for row in order],
        [data.digests[row] for row in order],
        data.task,
        data.fingerprint,
    )
