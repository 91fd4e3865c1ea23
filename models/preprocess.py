"""From bytes or text to the arrays that a backbone takes: decoding with limits, torch-free."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)
from tokenizers import Tokenizer
from tokenizers.models import Unigram

from models.spec import ImageTransform, TextTransform

# One input as the network takes it. Image: float32 (3, size, size). Text: int64 (tokens,).
Prepared = NDArray[Any]

# Where a JPEG says that it is to be turned.
_TURNED = {"exif", "xmp"}

# Named through their plugins: with only these loaded, Image.open does not import the forty others to look
# further.
FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        BmpImagePlugin.BmpImageFile,
        GifImagePlugin.GifImageFile,
        TiffImagePlugin.TiffImageFile,
    )
)
# A PNG of one pixel.
TINY_IMAGE = base64.b64decode(
    b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNoaGgAAAMEAYFL09IQAAAAAElFTkSuQmCC"
)
_NOT_AN_IMAGE = "This is not a readable JPEG, PNG, WebP, BMP, GIF or TIFF image."

# ImagePreprocessor checks its own limit on the header before anything is decoded. Pillow's is a second one
# for the whole process, which warns at 89 million pixels whatever the operator allowed.
Image.MAX_IMAGE_PIXELS = None

# Python keeps each text of a warning that it has shown, and Pillow's hold numbers out of the image: they
# would grow without end.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Above this, an image is decoded while no other such image is, and what is made of it is made in strips of
# about so many pixels: 50 million of them take up to 500 MB while they are decoded.
_LARGE_PIXELS = 4_000_000
_large = threading.Lock()

_INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


# More than any language takes on the average: a start of so many characters for each token kept has enough.
_CHARACTERS_PER_TOKEN = 16

# What SentencePiece makes of white space; a text's first piece may be nothing else.
_BLANK_PIECE = "\u2581"
# Unigram models name their unknown piece by its number, which the library does not tell.
_UNIGRAM_UNKNOWN = re.compile(rb'"unk_id"\s*:\s*(\d+)')

# Of a text's beginning, which tells of most texts that something of them is known.
_FIRST_CHARACTERS = 64

# Source pixels on either side that the widest of them, Lanczos, looks at.
_SUPPORT = 3


class InputError(ValueError):
    """One input that cannot be used; its neighbours can.

    code is one of undecodable_image, truncated_image, image_too_large, empty_image, unsupported_image,
    empty_text, text_too_long, invalid_text, no_known_tokens, wrong_kind. detail says what to do.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


@dataclass(frozen=True, slots=True)
class InputLimits:
    """Refused above: bytes of an encoded image, pixels in its header, characters of a text."""

    max_image_bytes: int = 16 << 20
    max_pixels: int = 50_000_000
    max_text_chars: int = 100_000


class ImagePreprocessor:
    """Encoded image → float32 (3, size, size), as timm's evaluation transform gives it. Thread-safe.

    Around that transform: EXIF orientation is applied, transparency composited on white, 16-bit grey scaled
    to 8, CMYK and grey made RGB, the first frame taken of an animation.
    """

    def __init__(self, transform: ImageTransform, limits: InputLimits = InputLimits()) -> None:
        """Raises ValueError for an interpolation or crop mode that cannot be reproduced."""
        if transform.interpolation not in _INTERPOLATIONS or transform.crop_mode not in ("center", "squash"):
            raise ValueError(f"no such preprocessing: {transform.interpolation}, {transform.crop_mode}")
        self.transform = transform
        self.limits = limits
        self._resampling = _INTERPOLATIONS[transform.interpolation]
        mean, std = (np.array(v, np.float32)[:, None, None] for v in (transform.mean, transform.std))
        self._scale = (1 / (255 * std)).astype(np.float32)
        self._shift = (mean / std).astype(np.float32)

    def __call__(self, data: bytes) -> Prepared:
        """Raises InputError."""
        with _open(data, self.limits) as image:
            large = image.width * image.height > _LARGE_PIXELS
            with _large if large else nullcontext():
                square = self._square(_as_rgb(image))
        pixels = np.asarray(square).transpose(2, 0, 1).astype(np.float32, order="C")
        pixels *= self._scale
        pixels -= self._shift
        return pixels

    def _square(self, image: Image.Image) -> Image.Image:
        """torchvision's Resize and CenterCrop, computing only the pixels that stay.

        Pillow rounds to 8 bits between the passes along the rows and along the columns, so the answer is the
        reference's only with the passes in the order in which Pillow resizes the whole. Going straight to the
        crop takes a third of the time, and a picture of one by a million pixels does not become one of 256 by
        256 million on the way.
        """
        size = self.transform.size
        scaled = int(size / self.transform.crop)
        if self.transform.crop_mode == "squash":
            margin = round((scaled - size) / 2)
            whole = image.resize((scaled, scaled), self._resampling)
            return whole.crop((margin, margin, margin + size, margin + size))
        width, height = image.size
        shorter = min(width, height)
        new_width, new_height = int(scaled * width / shorter), int(scaled * height / shorter)
        left, right = _span(width, new_width, size)
        top, bottom = _span(height, new_height, size)
        if height <= width:
            # In one call Pillow looks at the rows that it needs alone, and has the same order for these.
            return image.resize((size, size), self._resampling, box=(left, top, right, bottom))
        first, last = 0, height
        if height > 2 * width:
            if new_height < height:
                flat = image.resize((width, size), self._resampling, box=(0, top, width, bottom))
                return flat.resize((size, size), self._resampling, box=(left, 0, right, size))
            first = max(0, math.floor(top) - _SUPPORT - 1)
            last = min(height, math.ceil(bottom) + _SUPPORT + 1)
            image = image.crop((0, first, width, last))
        narrow = image.resize((size, last - first), self._resampling, box=(left, 0, right, last - first))
        return narrow.resize((size, size), self._resampling, box=(0, top - first, size, bottom - first))


def rgb(data: bytes, limits: InputLimits = InputLimits()) -> Image.Image:
    """The upright first frame in RGB, as ImagePreprocessor resizes it. Raises InputError."""
    with _open(data, limits) as image:
        decoded = _as_rgb(image)
        # The file is closed at the end, and an image that needed no conversion is the file's own.
        return decoded.copy() if decoded is image else decoded


def _span(length: int, scaled: int, size: int) -> tuple[float, float]:
    """Where the central `size` of `scaled` pixels lie among the `length` pixels that are scaled to them."""
    start = round((scaled - size) / 2)
    return start * length / scaled, min((start + size) * length / scaled, length)


@contextmanager
def _open(data: bytes, limits: InputLimits) -> Iterator[Image.Image]:
    """An image of which only the header was read. Whatever decoding it raises becomes an InputError."""
    if not data:
        raise InputError("empty_image", "The image has no bytes.")
    if len(data) > limits.max_image_bytes:
        raise InputError(
            "image_too_large",
            f"The image has {len(data)} bytes; at most {limits.max_image_bytes} are accepted.",
        )
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, limits)
            # All at once: between blocks, by default of 64 KB, the decoder waits for the interpreter.
            image.decodermaxblock = max(image.decodermaxblock, len(data))
            yield image
    except InputError:
        raise
    except UnidentifiedImageError:
        if _declares_no_pixels(data):
            raise InputError("empty_image", "The image is zero pixels wide or high.") from None
        raise InputError("undecodable_image", _NOT_AN_IMAGE) from None
    except MemoryError:
        raise
    except Exception as error:
        # Decoders of damaged files raise whatever they trip over: OSError, SyntaxError, struct.error,
        # IndexError, …
        if isinstance(error, EOFError) or "truncated" in str(error).lower():
            raise InputError(
                "truncated_image", "The image ends before its last pixel; send all of it."
            ) from error
        raise InputError("undecodable_image", _NOT_AN_IMAGE) from error


def _check_size(image: Image.Image, limits: InputLimits) -> None:
    pixels = image.width * image.height
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # A tile may claim to be larger than the picture, and libtiff unpacks whole tiles.
        tags = image.tag_v2
        tile = int(tags.get(TiffImagePlugin.TILEWIDTH, 0)) * int(tags.get(TiffImagePlugin.TILELENGTH, 0))
        pixels = max(pixels, tile)
    most = limits.max_pixels // 2 if _takes_twice(image) else limits.max_pixels
    if pixels > most:
        raise InputError(
            "image_too_large", f"The image has {pixels} pixels; at most {most} are accepted of its kind."
        )


def _takes_twice(image: Image.Image) -> bool:
    """Whether its decoder needs about twice as much memory for a pixel as others do.

    WebP's keeps two more pictures, for animations; a progressive JPEG's all coefficients, here of four inks.
    """
    return image.format == "WEBP" or (image.mode == "CMYK" and "progressive" in image.info)


def _declares_no_pixels(data: bytes) -> bool:
    """Pillow does not tell an image without pixels from one of no known format: look at the header again."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        width, height = data[16:20], data[20:24]
    elif data.startswith((b"GIF87a", b"GIF89a")):
        width, height = data[6:8], data[8:10]
    elif data.startswith(b"BM"):
        width, height = data[18:22], data[22:26]
    else:
        return False
    return bool(width and height) and not (any(width) and any(height))


def _as_rgb(image: Image.Image) -> Image.Image:
    """The upright first frame in RGB."""
    image.load()
    image = _upright(image)
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode in ("I", "F"):
        raise InputError(
            "unsupported_image", "Images of 32 bits a channel have no agreed white; convert to 8 or 16 bits."
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        white = Image.new("RGB", image.size, "white")
        for top, bottom in _strips(image.size):
            whole = bottom - top == image.height
            strip = image if whole else image.crop((0, top, image.width, bottom))
            clear = strip if strip.mode == "RGBA" else strip.convert("RGBA")
            white.paste(clear, (0, top), clear.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    if image.format == "JPEG" and not _TURNED & image.info.keys():
        return image
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:
        # Half of the damaged EXIF blocks in the wild belong to pictures that are fine, and were never turned.
        return image
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey in 8 bits, scaled, what is transparent white.

    Pillow's own conversion clips at 255, and nearly everything is white.
    """
    wide = np.asarray(image)
    grey = np.empty(wide.shape, np.uint8)
    transparent = image.info.get("transparency")
    for top, bottom in _strips(image.size):
        strip = wide[top:bottom]
        grey[top:bottom] = (strip.astype(np.uint32) + 128) // 257
        if isinstance(transparent, int):
            grey[top:bottom][strip == transparent] = 255
    return Image.fromarray(grey)


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The first row of each strip, and the one behind its last."""
    width, height = size
    rows = max(1, _LARGE_PIXELS // width)
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


class TextPreprocessor:
    """Text → int64 (tokens,), as the model's own tokenizer gives them, truncated to max_tokens. Thread-safe.

    No Unicode normalisation of its own: the tokenizer's is part of the model.
    """

    def __init__(
        self, transform: TextTransform, tokenizer: Path, limits: InputLimits = InputLimits()
    ) -> None:
        """Raises ValueError if the file is not the tokenizer of the transform."""
        serialised = tokenizer.read_bytes()
        if hashlib.sha256(serialised).hexdigest() != transform.tokenizer_sha256:
            raise ValueError(f"{tokenizer} is not the tokenizer of this backbone")
        self.transform = transform
        self.limits = limits
        # "Already borrowed" comes from setting truncation or padding while another thread encodes. Set here
        # once and never again, one tokenizer serves all threads.
        self._tokenizer = Tokenizer.from_buffer(serialised)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(transform.max_tokens)
        unknown = _unknown_id(self._tokenizer, serialised)
        # Tokens that say nothing of a text: the unknown one, and those that every text has.
        self._idle: frozenset[int] = frozenset()
        if unknown is not None:
            blank = self._tokenizer.token_to_id(_BLANK_PIECE)
            besides = [unknown] if blank is None else [unknown, blank]
            self._idle = frozenset([*self._encode("")[0], *besides])
        in_front = self._encode(transform.prompt)[0] if self._idle else []
        self._idle_in_front = self._idle.union(in_front)

    def __call__(self, text: str) -> Prepared:
        """Raises InputError."""
        return self.cut(text)[0]

    def cut(self, text: str) -> tuple[Prepared, bool]:
        """The tokens of a text that are kept, and whether there were more. Raises InputError."""
        if len(text) > self.limits.max_text_chars:
            raise InputError(
                "text_too_long",
                f"The text has {len(text)} characters; at most {self.limits.max_text_chars} are accepted.",
            )
        if not text or text.isspace():
            raise InputError("empty_text", "The text is empty or only white space.")
        if "\0" in text:
            raise InputError("invalid_text", "The text holds a NUL character.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                "invalid_text", "The text holds half of a surrogate pair; send valid Unicode."
            ) from None
        tokens, truncated = self._encode(self.transform.prompt + text)
        return np.array(tokens, dtype=np.int64), truncated

    def knows_nothing(self, text: str, tokens: Prepared) -> bool:
        """Whether no token of the text is a known one: an embedding of such a text says nothing.

        tokens: of the text, as they were prepared. What surrounds every text, special tokens and the prompt,
        does not count. False for every text where the tokenizer has no unknown token.
        """
        # Not converted to a list: the first word of most texts is known, and the others are not looked at.
        if not self._idle or not self._idle_in_front.issuperset(tokens):
            return False
        return not self.transform.prompt or self._idle.issuperset(self._encode(text)[0])

    def is_truncated(self, text: str) -> bool:
        """Whether a text has more tokens than are kept. Raises InputError."""
        # No character becomes more than four tokens, and special ones are few.
        most = 4 * (len(self.transform.prompt) + len(text) + 2)
        return most > self.transform.max_tokens and self.cut(text)[1]

    def is_unknown(self, text: str) -> bool:
        """As knows_nothing, of a text that is not prepared. Raises InputError."""
        if len(text) > _FIRST_CHARACTERS:
            # Without its last word, which may be cut off.
            words = text[:_FIRST_CHARACTERS].rsplit(maxsplit=1)
            if len(words) == 2 and not self.knows_nothing(words[0], self(words[0])):
                return False
        return self.knows_nothing(text, self(text))

    def _encode(self, text: str) -> tuple[list[int], bool]:
        """The tokens of a text that are kept, and whether there were more, looking at little of a long one.

        A tokenizer reads to the end, 0.1 s for 100,000 characters, to keep a few hundred tokens. A start that
        gives more than twice what is kept gives the same: what is cut off touches the last words only. Where
        it gives fewer, for a long word or white space, four times as much is tried.
        """
        characters = _CHARACTERS_PER_TOKEN * self.transform.max_tokens
        while characters < len(text):
            encoding = self._tokenizer.encode(text[:characters])
            if len(encoding.overflowing) >= 2:
                return list(encoding.ids), True
            characters *= 4
            # Most of a text is not worth a try: the whole costs little more.
            if 2 * characters > len(text):
                break
        encoding = self._tokenizer.encode(text)
        return list(encoding.ids), bool(encoding.overflowing)


def _unknown_id(tokenizer: Tokenizer, serialised: bytes) -> int | None:
    """The id of the token for what the vocabulary lacks, None if there is none.

    serialised: the tokenizer as JSON.
    """
    if isinstance(tokenizer.model, Unigram):
        found = _UNIGRAM_UNKNOWN.search(serialised)
        return None if found is None else int(found[1])
    token: str | None = getattr(tokenizer.model, "unk_token", None)
    known: int | None = None if token is None else tokenizer.token_to_id(token)
    return known
