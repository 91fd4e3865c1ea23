"""Embedded real inputs whose targets are known, kept on disk between runs, and near copies of some."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adapters.examples.target import Task
from benchmarks.data import datasets
from benchmarks.data.embeddings import BACKBONES, CHARACTERS, EmbeddedSet, embed, embedded
from benchmarks.honesty.scores import Known
from models.arrays import Floats
from models.spec import PACKAGED

_MOST_INPUTS = 4_000
_COPIED_INPUTS = 300  # of a set, as far as it goes

OPINIONS = ("opinions-products", "opinions-films", "opinions-tweets")
"""Texts with two labels, and with a rating from -4 to 4."""
TOPICS = "20-newsgroups"
IMAGES = ("tux-paint", "emoji-google", "fashion-mnist")
CLASSIFIED = (*OPINIONS, "sms-spam", "trec-coarse", "trec-fine", TOPICS, *IMAGES)
"""Every set with one label for each input."""
COPIED = ("opinions-products", "trec-coarse", TOPICS, "tux-paint")
"""Sets of which near copies are made."""
ALL_TAGS, THREE_TAGS = "topics, all words", "topics, three words"
"""TOPICS with the words of their names (rec, sport, hockey) as tags: all of them, or a few."""
_THREE_TAGS = ("comp", "politics", "religion")


@dataclass(frozen=True, slots=True)
class Copies:
    """Near copies of a set's first n inputs: rows, float32 (kinds, n, dim); [k, i] copies input i."""

    kinds: tuple[str, ...]
    rows: Floats


def _jpeg(data: bytes) -> bytes:
    encoded = io.BytesIO()
    _on_white(data).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def _smaller(data: bytes) -> bytes:
    image = _on_white(data)
    size = (round(image.width * 0.94), round(image.height * 0.94))
    encoded = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(encoded, "PNG")
    return encoded.getvalue()


def _on_white(data: bytes) -> Image.Image:
    """As the backbone sees it: what is transparent is white."""
    with Image.open(io.BytesIO(data)) as image:
        coloured = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")


_TEXT_COPIES: Mapping[str, Callable[[str], str]] = {
    "upper case": str.upper,
    "wider spacing": lambda text: text.replace(" ", "  "),
    "another line break": lambda text: text.replace(". ", ".\n", 1) + "\n",
    "a signature": lambda text: f"{text}\n\nRegards,\nAnna",
}
_IMAGE_COPIES: Mapping[str, Callable[[bytes], bytes]] = {"JPEG": _jpeg, "6 % smaller": _smaller}


def prepare(names: Sequence[str], copied: Sequence[str], folder: Path) -> None:
    """Embeds what is not kept in the folder yet: sets, and near copies of sets."""
    for source in sorted({_source(name) for name in names}):
        _embedded(source, folder)
    for name in sorted({_source(name) for name in copied}):
        if not _copies_path(name, folder).exists():
            data = datasets.load(name, folder)
            some = [sample.input for sample in datasets.stratified_order(data.samples, 0)[:_COPIED_INPUTS]]
            made: dict[str, list[bytes | str]] = {}
            if data.kind == "text":
                texts = [one[:CHARACTERS] for one in some if isinstance(one, str)]
                made = {kind: [copy(text) for text in texts] for kind, copy in _TEXT_COPIES.items()}
            else:
                images = [one for one in some if isinstance(one, bytes)]
                made = {kind: [copy(image) for image in images] for kind, copy in _IMAGE_COPIES.items()}
            _keep(
                _copies_path(name, folder),
                rows=np.stack([embed(BACKBONES[data.kind], copies) for copies in made.values()]),
                kinds=np.array(list(made)),
            )


@functools.cache
def classified(name: str, folder: Path) -> Known:
    """A set with one label for each input."""
    kept = _embedded(_source(name), folder)
    labels = kept.labels
    if name == "trec-coarse":
        labels = np.array([label.partition(":")[0] for label in labels.tolist()])
    return Known(name, "classification", kept.rows, labels)


@functools.cache
def tagged(name: str, folder: Path) -> Known:
    """ALL_TAGS or THREE_TAGS."""
    kept = _embedded(TOPICS, folder)
    words = [set(label.split(".")) for label in kept.labels.tolist()]
    names = _THREE_TAGS if name == THREE_TAGS else tuple(sorted(set().union(*words)))
    targets = np.array([[one in own for one in names] for own in words])
    return Known(name, "multilabel", kept.rows, targets, names)


@functools.cache
def rated(name: str, folder: Path) -> Known:
    """One of OPINIONS with its ratings."""
    kept = _embedded(name, folder)
    return Known(name, "regression", kept.rows, kept.values)


def known(task: Task, name: str, folder: Path) -> Known:
    """The set with this task's targets."""
    loaders = {"classification": classified, "multilabel": tagged, "regression": rated}
    return loaders[task](name, folder)


@functools.cache
def copies(name: str, folder: Path) -> Copies:
    """Near copies of one of COPIED."""
    with np.load(_copies_path(_source(name), folder)) as kept:
        return Copies(tuple(kept["kinds"].tolist()), kept["rows"])


def _source(name: str) -> str:
    return "trec-fine" if name == "trec-coarse" else name


def _embedded(name: str, folder: Path) -> EmbeddedSet:
    return embedded(name, folder, most=_MOST_INPUTS, backbone=_backbone(name))


def _backbone(name: str) -> str:
    return BACKBONES["image" if name in IMAGES else "text"]


def _copies_path(name: str, folder: Path) -> Path:
    fingerprint = PACKAGED[_backbone(name)].fingerprint
    return folder / "embeddings" / f"honesty-copies-{name}-{fingerprint[:16]}.npz"


def _keep(path: Path, **arrays: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(scratch, allow_pickle=False, **arrays)
    scratch.replace(path)
