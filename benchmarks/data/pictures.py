"""Photographs as a camera or a web page would send them, made from the Tux Paint stamps."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.data import datasets
from benchmarks.data.archives import DEFAULT_FOLDER
from benchmarks.data.datasets import Sample


def photographs(
    count: int, size: tuple[int, int] = (640, 480), folder: Path = DEFAULT_FOLDER
) -> list[Sample]:
    """`count` different JPEGs of `size` (width, height): stamps on grainy backgrounds, at quality 90.

    The grain is what a sensor leaves: without it a JPEG is small and decodes faster than a photograph's.
    """
    stamps: Sequence[Sample] = datasets.stratified_order(datasets.load("tux-paint", folder).samples, 0)
    return [_photograph(stamps[index % len(stamps)], index, size) for index in range(count)]


def _photograph(stamp: Sample, index: int, size: tuple[int, int]) -> Sample:
    assert isinstance(stamp.input, bytes)
    width, height = size
    random = np.random.Generator(np.random.PCG64(index))
    grain = random.normal(random.uniform(60, 200, 3), 9, (height, width, 3))
    picture = Image.fromarray(grain.clip(0, 255).astype(np.uint8))
    with Image.open(io.BytesIO(stamp.input)) as opened:
        cut = opened.convert("RGBA")
    scale = 0.9 * min(width / cut.width, height / cut.height)
    cut = cut.resize((round(scale * cut.width), round(scale * cut.height)), Image.Resampling.BILINEAR)
    picture.paste(cut, ((width - cut.width) // 2, (height - cut.height) // 2), cut)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    data = file.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    return dataclasses.replace(stamp, input=data, key=f"{stamp.key}#{index}", digest=digest)
