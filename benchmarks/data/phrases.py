"""Texts of an exact number of tokens, cut out of real ones."""

from __future__ import annotations

import dataclasses
from itertools import accumulate
from pathlib import Path

from benchmarks.data import datasets
from benchmarks.data.archives import DEFAULT_FOLDER
from benchmarks.data.datasets import Sample
from models.preprocess.text import TextPreprocessor
from models.spec import TOKENIZER_FILE, TextTransform
from models.store.exports import find
from models.store.manifest import read_manifest

_SPECIAL = 2  # [CLS] and [SEP]


def phrases(
    count: int,
    tokens: int,
    folder: Path = DEFAULT_FOLDER,
    backbone: str = "minilm-l6-v2",
) -> list[Sample]:
    """`count` different beginnings of 20 Newsgroups' texts, each `tokens` long with the special tokens."""
    export = find(backbone)
    if export is None:
        raise SystemExit(f"{backbone} is not exported; run `python -m models.export`")
    transform = read_manifest(export, verify=False).transform
    assert isinstance(transform, TextTransform)
    tokenizer = TextPreprocessor(transform, export / TOKENIZER_FILE)
    found: dict[str, Sample] = {}
    for sample in datasets.stratified_order(datasets.load("20-newsgroups", folder).part("train"), 0):
        assert isinstance(sample.input, str)
        # A tokenizer of word pieces never looks beyond white space, so lengths add up.
        words = sample.input.split()[:tokens]
        lengths = list(accumulate(len(tokenizer(word)) - _SPECIAL for word in words))
        if tokens - _SPECIAL in lengths:
            text = " ".join(words[: lengths.index(tokens - _SPECIAL) + 1])
            digest = datasets.text_digest(text)
            found.setdefault(digest, dataclasses.replace(sample, input=text, digest=digest))
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"there are only {len(found)} texts of {tokens} tokens")
