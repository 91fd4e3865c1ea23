"""One labelled input of a real data set."""

from __future__ import annotations

import hashlib
import io
import math
import unicodedata
from dataclasses import dataclass
from typing import Literal

from PIL import Image

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
