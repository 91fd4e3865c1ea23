"""Texts as networks take them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import Unigram

from models.arrays import Prepared
from models.preprocess.limits import InputError, InputLimits
from models.preprocess.pieces import PieceTokenizer
from models.spec import PIECES_FILE, TextTransform

# Characters to tokenize per token kept. It is above the average of any language, so they are usually enough.
_CHARACTERS_PER_TOKEN = 16
# SentencePiece's piece for white space; the first piece of a text may consist of it alone.
_BLANK_PIECE = "\u2581"
# Unigram models store the id of their unknown piece, but the library does not expose it.
_UNIGRAM_UNKNOWN = re.compile(rb'"unk_id"\s*:\s*(\d+)')
# Length of the start of a text, in characters, that is searched first for a known token. Most texts have one.
_FIRST_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class Silence:
    """How to recognise a text without known tokens: after the first `skipped`, all are in `tokens`."""

    # The unknown token and those that every text has, sorted; empty if the tokenizer has no unknown token.
    tokens: tuple[int, ...]
    skipped: int  # tokens in front of the text's own if there is a prompt; 0 without a prompt


class TextPreprocessor:
    """Text → int64 (tokens,) by the model's own tokenizer, truncated to `max_tokens`. Thread-safe.

    Unicode normalisation is left to the tokenizer, where it is part of the model.
    """

    def __init__(
        self, transform: TextTransform, tokenizer: Path, limits: InputLimits = InputLimits()
    ) -> None:
        """Load the tokenizer. Raises ValueError if the file is not the tokenizer of the transform."""
        serialised, beside = tokenizer.read_bytes(), tokenizer.with_name(PIECES_FILE)
        pieces = beside.read_bytes() if beside.exists() else b""
        if hashlib.sha256(serialised + pieces).hexdigest() != transform.tokenizer_sha256:
            raise ValueError(f"{tokenizer} is not the tokenizer of this backbone")
        self.transform = transform
        self.limits = limits
        # Setting truncation or padding while another thread encodes raises "Already borrowed". They are set
        # only here, so that all threads can share one tokenizer.
        self._tokenizer: Tokenizer | PieceTokenizer
        if pieces:
            self._tokenizer = PieceTokenizer(serialised, pieces, transform.max_tokens)
        else:
            self._tokenizer = Tokenizer.from_buffer(serialised)
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(transform.max_tokens)
        unknown = _unknown_id(self._tokenizer, serialised)
        # Tokens that carry no information: the unknown token, and those that every text has.
        self._idle: frozenset[int] = frozenset()
        if unknown is not None:
            blank = self._tokenizer.token_to_id(_BLANK_PIECE)
            besides = [unknown] if blank is None else [unknown, blank]
            self._idle = frozenset([*self._encode("")[0], *besides])
        in_front = self._encode(transform.prompt)[0] if self._idle else []
        self._idle_in_front = self._idle.union(in_front)

    def __call__(self, text: str) -> Prepared:
        """Tokenize one text. Raises InputError."""
        return self.cut(text)[0]

    def cut(self, text: str) -> tuple[Prepared, bool]:
        """Return the tokens of a text that are kept, and whether there were more. Raises InputError."""
        if len(text) > self.limits.max_text_chars:
            raise InputError(
                "text_too_long",
                f"The text has {len(text):,} characters; at most {self.limits.max_text_chars:,} are allowed.",
            )
        if not text or text.isspace():
            raise InputError("empty_text", "The text is empty, or only white space.")
        if "\0" in text:
            raise InputError("invalid_text", "The text has a NUL character. Remove it.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                "invalid_text", "The text has half of a surrogate pair. Send valid Unicode."
            ) from None
        return self.tokens(text)

    def tokens(self, text: str) -> tuple[Prepared, bool]:
        """Tokenize as `cut` does, without checking the text."""
        tokens, truncated = self._encode(self.transform.prompt + text)
        return np.array(tokens, dtype=np.int64), truncated

    def knows_nothing(self, text: str, tokens: Prepared) -> bool:
        """Whether the text has no known token, so that its embedding is meaningless.

        `tokens`: the prepared tokens of the text. Special tokens and the prompt do not count. Always False if
        the tokenizer has no unknown token.
        """
        # The array is not converted to a list, because the search usually stops at the first word.
        if not self._idle or not self._idle_in_front.issuperset(tokens):
            return False
        return not self.transform.prompt or self._idle.issuperset(self._encode(text)[0])

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, None if the tokenizer has no such token."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def is_truncated(self, text: str) -> bool:
        """Whether a text has more tokens than are kept. Raises InputError."""
        # A character becomes at most four tokens, and there are few special tokens.
        most = 4 * (len(self.transform.prompt) + len(text) + 2)
        return most > self.transform.max_tokens and self.cut(text)[1]

    @property
    def silence(self) -> Silence:
        """The rule of `knows_nothing` as data, for programs that only have the tokens."""
        prompt, skipped = self.transform.prompt, 0
        if prompt:
            first, second, alone = (self._encode(text)[0] for text in (f"{prompt}a", f"{prompt}b", "a"))
            skipped = min(_common(first, second), len(first) - _common(first[::-1], alone[::-1]))
        return Silence(tuple(sorted(self._idle)), skipped)

    def is_unknown(self, text: str) -> bool:
        """Whether `knows_nothing` holds for a text that is not prepared. Raises InputError."""
        if len(text) > _FIRST_CHARACTERS:
            # The last word may be cut off, so it is left out.
            words = text[:_FIRST_CHARACTERS].rsplit(maxsplit=1)
            if len(words) == 2 and not self.knows_nothing(words[0], self(words[0])):
                return False
        return self.knows_nothing(text, self(text))

    @staticmethod
    def where(holds: Callable[[str], bool], inputs: Sequence[bytes | str]) -> frozenset[int]:
        """The positions of texts for which `holds` is true, without those that it raises InputError for."""
        found: set[int] = set()
        for index, item in enumerate(inputs):
            with suppress(InputError):
                if isinstance(item, str) and holds(item):
                    found.add(index)
        return frozenset(found)

    def _encode(self, text: str) -> tuple[list[int], bool]:
        """Return the tokens that are kept and whether there were more, reading little of a long text.

        A tokenizer reads to the end, 0.1 s for 100,000 characters, to keep a few hundred tokens. A start of
        the text with more than twice the tokens kept gives the same result, because the cut only affects the
        last words. If it gives fewer, as with long words or white space, a start four times as long is tried.
        """
        characters = _CHARACTERS_PER_TOKEN * self.transform.max_tokens
        while characters < len(text):
            encoding = self._tokenizer.encode(text[:characters])
            if len(encoding.overflowing) >= 2:
                return list(encoding.ids), True
            characters *= 4
            # More than half of a text is not tried, because the whole text costs little more.
            if 2 * characters > len(text):
                break
        encoding = self._tokenizer.encode(text)
        return list(encoding.ids), bool(encoding.overflowing)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _unknown_id(tokenizer: Tokenizer | PieceTokenizer, serialised: bytes) -> int | None:
    """The id of the unknown token, None if there is none. `serialised`: the tokenizer as JSON."""
    if isinstance(tokenizer, PieceTokenizer):
        return tokenizer.unknown_id
    if isinstance(tokenizer.model, Unigram):
        found = _UNIGRAM_UNKNOWN.search(serialised)
        return None if found is None else int(found[1])
    token: str | None = getattr(tokenizer.model, "unk_token", None)
    known: int | None = None if token is None else tokenizer.token_to_id(token)
    return known
