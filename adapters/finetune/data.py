"""Training inputs in batches, prepared as in serving or augmented. Requires torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from models.arrays import Prepared
from models.preprocess.image import ImagePreprocessor, rgb
from models.preprocess.limits import InputLimits
from models.preprocess.text import TextPreprocessor
from models.spec import BackboneSpec, ImageTransform

Tensors = tuple[torch.Tensor, ...]
"""Inputs of a batch: (images,), uint8 (n, height, width, 3), or (ids, mask), int64 (n, tokens)."""

# Share of an image that a crop keeps. timm's minimum of 0.08 suits a million images, not hundreds.
_CROP = (0.5, 1.0)
_HIDDEN = 0.1  # share of word pieces that are masked in training
_MASKS = ("[MASK]", "<mask>")  # mask tokens in the vocabularies of BERT and RoBERTa
# Pixels and word pieces in one forward and backward pass on a CPU, per thread. Measured with one thread:
# EfficientNet-Lite0 at 224 pixels takes 105 ms an image in batches of 32, whose activations exceed the cache,
# 65 ms in batches of 4, 64 of 2, 74 alone. MiniLM-L6 takes 16 ms a TREC question with 192 word pieces as with
# 96, 18 with 64, 24 with 32. In smaller passes each layer is also shorter, so a prediction that needs the
# core waits less.
_PIXELS_AT_ONCE = 2 * 224 * 224
_TOKENS_AT_ONCE = 96


class Samples(Protocol):
    """Inputs by row number. Images and texts differ in how they are prepared, padded and augmented.

    `size`: side of the images as served, in pixels; 0 for texts. `vocabulary`: int64 (n,), sorted, the word
    pieces that may occur; None for images.
    """

    @property
    def size(self) -> int: ...

    @property
    def vocabulary(self) -> torch.Tensor | None: ...

    def plain(self, rows: Sequence[int]) -> Tensors:
        """The rows exactly as serving prepares them."""
        ...

    def augmented(self, rows: Sequence[int], size: int) -> Tensors:
        """The rows with random changes that keep their labels.

        `size`: of images in pixels, 0 for the backbone's own. Randomness comes from torch's and Python's
        global generators, which `seeded` sets.
        """
        ...

    def pieces(self, rows: Sequence[int], size: int) -> list[list[int]]:
        """The rows in parts of the size that trains fastest on a CPU; each takes milliseconds per layer."""
        ...


def seeded(*parts: int) -> torch.Generator:
    """Seed the generators that augmentation uses, and return a separate one for the order of rows."""
    seed = hash(parts) & 0x7FFFFFFF
    random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def samples_of(
    spec: BackboneSpec,
    inputs: Sequence[bytes | str],
    tokenizer: Path | None = None,
    limits: InputLimits = InputLimits(),
) -> Samples:
    """The inputs of an adapter as samples for its backbone, images or texts.

    `tokenizer`: file of a text backbone's tokenizer, with the pieces file beside it if there is one.
    `limits`: those that the inputs were accepted with.
    Raises InputError for a text that cannot be used; images are decoded only when they are needed.
    """
    if isinstance(spec.transform, ImageTransform):
        return Images(spec.transform, [bytes(one) for one in inputs if isinstance(one, bytes)], limits)
    if tokenizer is None:
        raise ValueError("a text backbone needs its tokenizer")
    prepare = TextPreprocessor(spec.transform, tokenizer, limits)
    texts = [prepare(one) for one in inputs if isinstance(one, str)]
    masks = [prepare.token_to_id(token) for token in _MASKS]
    return Texts(texts, spec.transform.pad_id, next((mask for mask in masks if mask is not None), None))


class Images:
    """Encoded images, decoded on every use: thousands of decoded ones would take gigabytes of memory."""

    vocabulary = None

    def __init__(
        self, transform: ImageTransform, images: Sequence[bytes], limits: InputLimits = InputLimits()
    ) -> None:
        self._transform = transform
        self._images = images
        self._limits = limits
        self.size = transform.size
        self._prepare = ImagePreprocessor(transform, limits)
        self._changing: dict[int, Any] = {}

    def plain(self, rows: Sequence[int]) -> Tensors:
        return (torch.from_numpy(np.stack([self._prepare(self._images[row]) for row in rows])),)

    def augmented(self, rows: Sequence[int], size: int) -> Tensors:
        """Apply timm's training transform with a gentler crop and without colour changes."""
        size = size or self._transform.size
        if size not in self._changing:
            self._changing[size] = _training_transform(replace(self._transform, size=size))
        change = self._changing[size]
        changed = torch.stack([change(rgb(self._images[row], self._limits)) for row in rows])
        return (changed.permute(0, 2, 3, 1),)

    def pieces(self, rows: Sequence[int], size: int) -> list[list[int]]:
        """Parts of a few images each."""
        most = torch.get_num_threads() * _PIXELS_AT_ONCE // (size or self.size) ** 2
        return list(batches(rows, max(1, most)))


def _training_transform(transform: ImageTransform) -> Any:
    import timm

    return timm.data.create_transform(
        input_size=(3, transform.size, transform.size),
        is_training=True,
        scale=_CROP,
        hflip=0.5,
        color_jitter=None,
        interpolation=transform.interpolation,
        # Images stay uint8 here; the model normalises them.
        normalize=False,
    )


class Texts:
    """Tokenised texts, padded on the right to the longest of a batch."""

    size = 0

    def __init__(self, texts: Sequence[Prepared], pad_id: int, mask_id: int | None) -> None:
        self._texts = [torch.from_numpy(text) for text in texts]
        self._pad_id = pad_id
        self._mask_id = mask_id
        besides = [one for one in (pad_id, mask_id) if one is not None]
        self.vocabulary = torch.unique(torch.cat([*self._texts, torch.tensor(besides)]))

    def plain(self, rows: Sequence[int]) -> Tensors:
        texts = [self._texts[row] for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self._pad_id)
        lengths = torch.tensor([len(text) for text in texts])
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()

    def augmented(self, rows: Sequence[int], size: int) -> Tensors:
        """Mask a tenth of the word pieces, never the first or the last."""
        ids, mask = self.plain(rows)
        if self._mask_id is not None:
            # Masking text by text makes the choice independent of the padded length.
            for row, length in zip(ids, mask.sum(dim=1).tolist(), strict=True):
                inner = row[1 : length - 1]
                inner[torch.rand(inner.shape) < _HIDDEN] = self._mask_id
        return ids, mask

    def pieces(self, rows: Sequence[int], size: int) -> list[list[int]]:
        """Parts of texts of similar length, which need little padding."""
        parts: list[list[int]] = []
        most = torch.get_num_threads() * _TOKENS_AT_ONCE
        for row in sorted(rows, key=lambda row: len(self._texts[row])):
            # This text is the longest so far, to which the others of its part are padded.
            if parts and (len(parts[-1]) + 1) * len(self._texts[row]) <= most:
                parts[-1].append(row)
            else:
                parts.append([row])
        return parts


def batches(rows: Sequence[int], size: int, generator: torch.Generator | None = None) -> Iterator[list[int]]:
    """Yield the rows in batches of at most `size`, shuffled if a generator is given."""
    order = range(len(rows)) if generator is None else torch.randperm(len(rows), generator=generator).tolist()
    ordered = [rows[place] for place in order]
    for begin in range(0, len(ordered), size):
        yield ordered[begin : begin + size]
