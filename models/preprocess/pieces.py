"""Tokenizers with hundreds of thousands of pieces, in a fraction of the memory of the tokenizers library.

The library splits a text into words, by a tokenizer.json that has no pieces; this module splits the words, by
the pieces in pieces.safetensors. See docs/decisions.md.
"""

from __future__ import annotations

import json
import math
from array import array
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from tokenizers import Tokenizer

from models.arrays import Floats
from models.spec import PIECES_FILE, TOKENIZER_FILE

_UNKNOWN_PENALTY = 10.0  # as in SentencePiece: an unknown character is this much worse than the worst piece
_REMEMBERED = 8192  # words whose pieces are remembered
_LONGEST_REMEMBERED = 24  # characters; longer words are rarely seen again


@dataclass(frozen=True, slots=True)
class PieceTokens:
    """The kept tokens of a text, with the names of the tokenizers library."""

    ids: list[int]
    overflowing: range  # one for each further window of the text, up to two


class PieceTokenizer:
    """Text → the tokens that the tokenizer of `whole_tokenizer` gives, truncated. Thread-safe.

    Words become the pieces with the highest sum of scores (Kudo 2018), by the same steps and in the same
    precision as in the library, so that ties are decided alike.
    """

    def __init__(self, serialised: bytes, pieces: bytes, max_tokens: int) -> None:
        """Load the contents of tokenizer.json and the pieces file. Raises ValueError if damaged."""
        self._words = Tokenizer.from_buffer(serialised)
        about = json.loads(serialised)
        self.unknown_id: int = about["model"]["unk_id"]
        found, scores = unpacked(pieces)
        # As UTF-8, because bytes take less memory than strings.
        self._ids = dict(zip(found, range(len(found)), strict=True))
        self._scores = array("d", scores.tobytes())
        self._unknown_score = float(scores.min()) - _UNKNOWN_PENALTY
        self._unknown = found[self.unknown_id].decode()
        self._longest = _longest(found)
        # Ids of the special tokens, by their ids in the tokenizer of the words.
        self._special = {
            self._words.token_to_id(one["content"]): self._ids[one["content"].encode()]
            for one in about["added_tokens"]
        }
        around = self._words.encode("a").ids
        place = around.index(self.unknown_id)
        self._front = [self._special[one] for one in around[:place]]
        self._back = [self._special[one] for one in around[place + 1 :]]
        self._kept = max_tokens - len(self._front) - len(self._back)
        self._remembered = lru_cache(_REMEMBERED)(self._split)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, None if there is none."""
        return self._ids.get(token.encode())

    def encode(self, text: str) -> PieceTokens:
        """Tokenize a text; the special tokens around it are included."""
        words = self._words.encode(text, add_special_tokens=False)
        enough = 2 * self._kept + 1  # tokens that tell that there are two further windows
        ids: list[int] = []
        for word, kind in zip(words.tokens, words.ids, strict=True):
            if kind != self.unknown_id:
                ids.append(self._special[kind])
            elif word == self._unknown:
                ids.append(self.unknown_id)
            else:
                ids += self._remembered(word) if len(word) <= _LONGEST_REMEMBERED else self._split(word)
            if len(ids) >= enough:
                break
        further = range(min(2, max(len(ids) - 1, 0) // self._kept))
        return PieceTokens([*self._front, *ids[: self._kept], *self._back], further)

    def _split(self, word: str) -> tuple[int, ...]:
        """The pieces of a word; unknown characters in a row are one piece."""
        ids, scores, text = self._ids, self._scores, word.encode()
        # Where characters begin, and where the last one ends.
        places = [place for place, byte in enumerate(text) if byte & 0xC0 != 0x80]
        size = len(places)
        places.append(len(text))
        best, begins, pieces = [0.0, *[-math.inf] * size], [0] * (size + 1), [0] * (size + 1)
        for begin in range(size):
            until_here, known, place = best[begin], False, places[begin]
            for end in range(begin + 1, min(begin + self._longest[text[place]], size) + 1):
                piece = ids.get(text[place : places[end]])
                if piece is None:
                    continue
                known = known or end == begin + 1
                score = until_here + scores[piece]
                if score > best[end]:
                    best[end], begins[end], pieces[end] = score, begin, piece
            if not known and until_here + self._unknown_score > best[begin + 1]:
                best[begin + 1] = until_here + self._unknown_score
                begins[begin + 1], pieces[begin + 1] = begin, self.unknown_id
        found: list[int] = []
        end = size
        while end:
            if pieces[end] != self.unknown_id or not found or found[-1] != self.unknown_id:
                found.append(pieces[end])
            end = begins[end]
        return tuple(reversed(found))


def _longest(pieces: list[bytes]) -> list[int]:
    """The length of the longest piece in characters, by its first byte."""
    text = np.frombuffer(b"".join(pieces), np.uint8)
    ends = np.cumsum([len(piece) for piece in pieces])
    characters = np.cumsum((text & 0xC0) != 0x80)[ends - 1]
    longest = np.zeros(256, np.int64)
    np.maximum.at(longest, text[np.r_[0, ends[:-1]]], np.diff(characters, prepend=0))
    return longest.tolist()


def whole_tokenizer(export: Path) -> Tokenizer:
    """The tokenizer of a text export as one object of the tokenizers library, for other programs."""
    file, pieces = export / TOKENIZER_FILE, export / PIECES_FILE
    if not pieces.exists():
        return Tokenizer.from_file(str(file))
    return Tokenizer.from_str(joined(file.read_bytes(), pieces.read_bytes()))


def joined(serialised: bytes, pieces: bytes) -> str:
    """A tokenizer.json with its pieces, as the tokenizers library reads it."""
    about = json.loads(serialised)
    found, scores = unpacked(pieces)
    vocabulary = [piece.decode() for piece in found]
    about["model"]["vocab"] = list(zip(vocabulary, scores.tolist(), strict=True))
    for one in about["added_tokens"]:
        one["id"] = vocabulary.index(one["content"])
    return json.dumps(about, ensure_ascii=False)


def packed(pieces: list[str], scores: Floats) -> bytes:
    """The contents of pieces.safetensors. `scores`: float64 (pieces,)."""
    text = np.frombuffer("\n".join(pieces).encode(), np.uint8)
    serialised: bytes = save({"pieces": text, "scores": scores})
    return serialised


def unpacked(serialised: bytes) -> tuple[list[bytes], Floats]:
    """The pieces, as UTF-8, and their scores. Raises ValueError if the bytes are damaged."""
    try:
        arrays = load(serialised)
        pieces, scores = arrays["pieces"].tobytes().split(b"\n"), arrays["scores"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"not the pieces of a tokenizer: {error}") from error
    if len(pieces) != len(scores):
        raise ValueError("the pieces of the tokenizer and their scores differ in number")
    return pieces, scores
