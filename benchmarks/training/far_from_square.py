"""How a picture that is far from square is best shown to a square network: accuracy of heads on panoramas.

Cut-outs and drawings of the design's sets stand at the left, in the middle or at the right of wide canvases,
or at the top, in the middle or at the bottom of tall ones, in front of photographs. Heads are fitted as the
service fits them, on embeddings of each way to make a square of the picture.

python -m benchmarks.training.far_from_square
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from adapters.probe.fit import Dataset, fit
from benchmarks.data import datasets
from benchmarks.data.archives import DEFAULT_FOLDER
from benchmarks.data.datasets import Sample
from benchmarks.harness.report import Report, table
from models.arrays import Floats
from models.backbone import Backbone
from models.preprocess.square import to_square
from models.spec import PACKAGED, ImageTransform
from models.store.exports import find

BACKBONE = "efficientnet-lite0"
# How many samples of each set, and the width over the height of the canvases.
SETS: Mapping[str, tuple[int, tuple[float, ...]]] = {
    "tux-paint": (260, (16 / 9, 2.0, 3.0, 1 / 3)),
    "emoji-google": (180, (3.0,)),
    "fashion-mnist": (150, (3.0,)),
}
SEEDS = 3
_THREADS = 4
# Pixels of the shorter side, and the share of it that the object takes.
_SIDE = 320
_SHARE = 0.75
_MOST_TILES = 8
_PHOTOGRAPHS = ("brick", "coffee", "grass", "gravel", "rocket", "chelsea", "hubble-deep-field")

Squares = list[Image.Image]
Way = Callable[[Image.Image, int], Squares]
Colour = tuple[int, int, int]


def served(crop_mode: str) -> Way:
    """As the backbone would be shown it in that mode."""

    def show(image: Image.Image, size: int) -> Squares:
        transform = PACKAGED[BACKBONE].transform
        assert isinstance(transform, ImageTransform)
        return [to_square(image, replace(transform, crop_mode=crop_mode))]

    return show


def squeezed(most: float, colour: Callable[[Image.Image], Colour]) -> Way:
    """The whole picture, squeezed to at most this multiple of its shorter side, the rest filled up."""

    def show(image: Image.Image, size: int) -> Squares:
        longer = max(image.size)
        width, height = (max(round(size * side / longer), round(size / most)) for side in image.size)
        small = image.resize((width, height), Image.Resampling.BICUBIC)
        square = Image.new("RGB", (size, size), colour(image))
        square.paste(small, ((size - width) // 2, (size - height) // 2))
        return [square]

    return show


def white(image: Image.Image) -> Colour:
    """As behind transparency."""
    return (255, 255, 255)


def mean(image: Image.Image) -> Colour:
    """The picture's mean colour."""
    red, green, blue = np.asarray(image.reduce(max(1, min(image.size) // 32))).mean((0, 1)).round().tolist()
    return int(red), int(green), int(blue)


def tiles(image: Image.Image, size: int) -> Squares:
    """Squares side by side, as few as show all of the picture, and at most eight."""
    width, height = image.size
    shorter, longer = min(image.size), max(image.size)
    count = min(_MOST_TILES, math.ceil(longer / shorter - 0.01))
    starts = [round((longer - shorter) * place / max(1, count - 1)) for place in range(count)]
    boxes = [
        (start, 0, start + height, height) if width >= height else (0, start, width, start + width)
        for start in starts
    ]
    return [image.resize((size, size), Image.Resampling.BICUBIC, box) for box in boxes]


WAYS: Mapping[str, Way] = {
    "centre": served("center"),
    "padded, white": squeezed(math.inf, white),
    "padded, mean": squeezed(math.inf, mean),
    "squeezed to 1:1": squeezed(1.0, white),
    "folded from 2:1": served("fold"),
    "tiles": tiles,
}


def backgrounds() -> list[Image.Image]:
    """Photographs of things that are in none of the sets."""
    folder = Path(__file__).parents[2] / "models" / "export" / "calibration"
    return [Image.open(folder / f"{name}.jpg").convert("RGB") for name in _PHOTOGRAPHS]


def panorama(sample: Sample, ratio: float, behind: Sequence[Image.Image]) -> tuple[Image.Image, int]:
    """The sample on a canvas of that width over height, and where on it: 0, 1, 2 from the left or top."""
    assert isinstance(sample.input, bytes)
    random = np.random.Generator(np.random.PCG64(int(sample.digest[:12], 16)))
    place = int(random.integers(3))
    background = behind[int(random.integers(len(behind)))]
    width, height = (round(_SIDE * ratio), _SIDE) if ratio >= 1 else (_SIDE, round(_SIDE / ratio))
    # Side by side with its mirror image until it is large enough, then a piece of that.
    double = Image.new("RGB", (4 * background.width, 4 * background.height))
    for column in range(4):
        for row in range(4):
            one = ImageOps.mirror(background) if column % 2 else background
            one = ImageOps.flip(one) if row % 2 else one
            double.paste(one, (column * background.width, row * background.height))
    double = ImageOps.scale(double, max(1.0, 1.1 * max(width / double.width, height / double.height)))
    left, top = int(random.integers(double.width - width)), int(random.integers(double.height - height))
    canvas = double.crop((left, top, left + width, top + height))
    with Image.open(io.BytesIO(sample.input)) as opened:
        cut = ImageOps.contain(opened.convert("RGBA"), (round(_SHARE * _SIDE), round(_SHARE * _SIDE)))
    spare = (canvas.width - cut.width, canvas.height - cut.height)
    along = (0.04, 0.5, 0.96)[place]
    at = (round(spare[0] * along), spare[1] // 2) if ratio >= 1 else (spare[0] // 2, round(spare[1] * along))
    canvas.paste(cut, at, cut)
    return canvas, place


def _embed(backbone: Backbone, show: Way, image: Image.Image) -> Floats:
    """The mean embedding of the squares that are shown of an image."""
    transform = backbone.spec.transform
    assert isinstance(transform, ImageTransform)
    squares = show(image, transform.size)
    pixels = np.stack([np.asarray(square, np.float32).transpose(2, 0, 1) / 255 for square in squares])
    center, spread = (np.array(part, np.float32)[:, None, None] for part in (transform.mean, transform.std))
    rows: Floats = backbone.run(list((pixels - center) / spread)).mean(axis=0)
    return rows


def right_of(
    rows: Floats, samples: Sequence[Sample], train: Sequence[int], test: Sequence[int]
) -> NDArray[np.bool_]:
    """True for each test sample that a head fitted on the training samples answers right."""
    labels, digests = zip(*((samples[index].label, samples[index].digest) for index in train), strict=True)
    # As in the service's fitting process: more threads of BLAS are slower.
    with threadpool_limits(1):
        head = fit(Dataset(rows[train], labels, digests, "classification", "0" * 64)).head
    answers = head.predict(rows[test]).answers
    return np.array([head.labels[one] == samples[i].label for one, i in zip(answers, test, strict=True)])


def splits(samples: Sequence[Sample]) -> dict[str, list[tuple[list[int], list[int]]]]:
    """Rows to train on and to test, for each seed, by name."""
    index = {sample.digest: row for row, sample in enumerate(samples)}
    found: dict[str, list[tuple[list[int], list[int]]]] = defaultdict(list)
    for seed in range(SEEDS):
        ordered = datasets.stratified_order(samples, seed)
        share = round(0.7 * len(ordered))
        pairs = {"70/30": (ordered[:share], ordered[share:])}
        for count in (5, 10):
            pairs[f"{count} a class"] = datasets.shots(samples, count, seed)
        for name, pair in pairs.items():
            train, test = ([index[sample.digest] for sample in part] for part in pair)
            found[name].append((train, test))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes benchmarks/results/far_from_square.md and .json."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.far_from_square", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TOPWORK_DATA", DEFAULT_FOLDER)))
    options = parser.parse_args(arguments)
    folder = find(BACKBONE)
    if folder is None:
        raise SystemExit(f"export the backbone first: python -m models.export {BACKBONE}")
    backbone, behind = Backbone.open(folder, threads=1), backgrounds()
    report = Report("far_from_square", "Pictures far from square")
    for name, (most, ratios) in SETS.items():
        samples = datasets.stratified_order(datasets.load(name, options.data).samples, 0)[:most]
        rows: dict[tuple[str, float], Floats] = {}
        places: dict[float, NDArray[np.int64]] = {}
        for ratio in ratios:
            made = [panorama(sample, ratio, behind) for sample in samples]
            places[ratio] = np.array([place for _, place in made])
            for way, show in WAYS.items():
                with ThreadPoolExecutor(_THREADS) as threads:
                    found = threads.map(partial(_embed, backbone, show), (image for image, _ in made))
                    rows[way, ratio] = np.stack(list(found))
            print(f"{name} {ratio:.2f} embedded", file=sys.stderr, flush=True)
        for split, pairs in splits(samples).items():
            lines = []
            for way in WAYS:
                means = [_mean(rows[way, ratio], places[ratio], samples, pairs) for ratio in ratios]
                report.data[f"{name}, {split}, {way}"] = dict(
                    zip((f"{ratio:.2f}" for ratio in ratios), means, strict=True)
                )
                lines.append([way, *(f"{all_:.3f} ({middle:.3f})" for all_, middle in means)])
            head = ["width over height", *(f"{ratio:.2f}" for ratio in ratios)]
            report.add(f"{name}, {split}: all places (in the middle)", table(head, lines))
    return report.finish()


def _mean(
    rows: Floats,
    places: NDArray[np.int64],
    samples: Sequence[Sample],
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> tuple[float, float]:
    """Accuracy over the splits: of all test pictures, and of those whose object stands in the middle."""
    found = [right_of(rows, samples, train, test) for train, test in pairs]
    middle = [right[places[list(test)] == 1] for right, (_, test) in zip(found, pairs, strict=True)]
    return float(np.concatenate(found).mean()), float(np.concatenate(middle).mean())


if __name__ == "__main__":
    raise SystemExit(main())
