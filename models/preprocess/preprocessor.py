"""From bytes or text to the arrays that a backbone takes: decoding with limits, torch-free."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
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

from models.preprocess.decoder import Decoder, Waiting, wait_unseen
from models.preprocess.image_file import LARGE_PIXELS, NOT_AN_IMAGE, ImageFile, read_image_file
from models.preprocess.limits import InputError as InputError
from models.preprocess.limits import InputLimits as InputLimits
from models.spec import CROP_MODES, FAR_FROM_SQUARE, ImageTransform, TextTransform

# One input as the network takes it. Image: float32 (3, size, size). Text: int64 (tokens,).
Prepared = NDArray[Any]

# With its plugins loaded, Image.open does not import the forty others to look further.
_PLUGINS = (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
# Decoders that would take threads for themselves.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

# How to undo what a camera did, by the number that EXIF has for it.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What 16 bits hold that were filled from an analogue converter: 10, 12 and 14 bits, or 8.
_DEPTHS = (8, 10, 12, 14, 16)
# A picture of 16 bits a channel whose brightest one has 12 or fewer is nearly black: it was not scaled.
_UNSCALED = 1 << 4

# A PNG of one pixel.
TINY_IMAGE = base64.b64decode(
    b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNoaGgAAAMEAYFL09IQAAAAAElFTkSuQmCC"
)

# ImagePreprocessor checks its own limit on the header before anything is decoded. Pillow's is a second one
# for the whole process, which warns at 89 million pixels whatever the operator allowed.
Image.MAX_IMAGE_PIXELS = None

# Python keeps each text of a warning that it has shown, and Pillow's hold numbers out of the image: they
# would grow without end.
warnings.filterwarnings("ignore", module=r"PIL\.")
# What Pillow finds in a damaged image belongs into its refusal, and not into the log.
logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)

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


class ImagePreprocessor:
    """Encoded image → uint8 (size, size, 3), near squares as timm's evaluation transform sees it.

    Thread-safe. The network normalises the bytes itself. Around that transform: EXIF orientation is applied,
    transparency composited on white, 16-bit grey scaled to 8, CMYK and grey made RGB, the first frame taken
    of an animation. Colour profiles are not applied. Large images, and those whose cost is in doubt, are
    decoded in another process.
    """

    def __init__(
        self, transform: ImageTransform, limits: InputLimits = InputLimits(), decoder: Decoder | None = None
    ) -> None:
        """decoder: the one that all preprocessors of this process share by default.

        Raises ValueError for an interpolation or crop mode that cannot be reproduced.
        """
        if transform.interpolation not in _INTERPOLATIONS or transform.crop_mode not in CROP_MODES:
            raise ValueError(f"no such preprocessing: {transform.interpolation}, {transform.crop_mode}")
        self.transform = transform
        self.limits = limits
        self._decoder = decoder or Decoder.shared()

    def __call__(self, data: bytes, waiting: Waiting = wait_unseen) -> Prepared:
        """waiting(True) is called where another process begins to decode, waiting(False) once it is done.

        Raises InputError.
        """
        file = _checked(data, self.limits)
        if file.large:
            square = self._decoder.decode(file, self.transform, self.limits, waiting)
        else:
            square = self.square(file)
        return np.asarray(square)

    def square(self, file: ImageFile) -> Image.Image:
        """What the network sees, in RGB, decoded in this thread however large it is. Raises InputError."""
        with _open(file, self.limits) as image:
            return to_square(_as_rgb(image, file), self.transform)


def to_square(image: Image.Image, transform: ImageTransform) -> Image.Image:
    """What the network sees of an upright RGB image, size × size pixels. See ImageTransform.crop_mode."""
    size, resampling = transform.size, _INTERPOLATIONS[transform.interpolation]
    if transform.crop_mode == "squash":
        scaled = int(size / transform.crop)
        margin = round((scaled - size) / 2)
        whole = image.resize((scaled, scaled), resampling)
        return whole.crop((margin, margin, margin + size, margin + size))
    if transform.crop_mode == "fold" and max(image.size) >= FAR_FROM_SQUARE * min(image.size):
        return _folded(image, size, resampling)
    return _centre(image, size, int(size / transform.crop), resampling)


def _folded(image: Image.Image, size: int, resampling: Image.Resampling) -> Image.Image:
    """All of a long picture: cut into equal parts that lie one below the other, of a tall one side by side.

    As many parts as make about a square, squeezed or stretched to fill it. At most one a pixel, so the strip
    that is cut has about as many pixels as the square, whatever the picture's shape.
    """
    wide = image.width >= image.height
    parts = min(size, round(math.sqrt(max(image.size) / min(image.size))))
    length, across = size * parts, -(-size // parts)
    strip = image.resize((length, across) if wide else (across, length), resampling)
    square = Image.new("RGB", (size, size))
    for part in range(parts):
        # What begins left of the square or above it, or ends beyond it, is left out.
        along, aside = -size * part, size * part // parts
        square.paste(strip, (along, aside) if wide else (aside, along))
    return square


def _centre(image: Image.Image, size: int, scaled: int, resampling: Image.Resampling) -> Image.Image:
    """torchvision's Resize and CenterCrop, computing only the pixels that stay.

    Pillow rounds to 8 bits between the passes along the rows and along the columns, so the answer is the
    reference's only with the passes in the order in which Pillow resizes the whole. Going straight to the
    crop takes a third of the time, and a picture of one by a million pixels does not become one of 256 by
    256 million on the way.
    """
    width, height = image.size
    shorter = min(width, height)
    new_width, new_height = int(scaled * width / shorter), int(scaled * height / shorter)
    left, right = _span(width, new_width, size)
    top, bottom = _span(height, new_height, size)
    if height <= width:
        # In one call Pillow looks at the rows that it needs alone, and has the same order for these.
        return image.resize((size, size), resampling, box=(left, top, right, bottom))
    first, last = 0, height
    if height > 2 * width:
        if new_height < height:
            flat = image.resize((width, size), resampling, box=(0, top, width, bottom))
            return flat.resize((size, size), resampling, box=(left, 0, right, size))
        first = max(0, math.floor(top) - _SUPPORT - 1)
        last = min(height, math.ceil(bottom) + _SUPPORT + 1)
        image = image.crop((0, first, width, last))
    narrow = image.resize((size, last - first), resampling, box=(left, 0, right, last - first))
    return narrow.resize((size, size), resampling, box=(0, top - first, size, bottom - first))


def rgb(data: bytes, limits: InputLimits = InputLimits()) -> Image.Image:
    """The upright first frame in RGB, as ImagePreprocessor resizes it. Raises InputError."""
    file = _checked(data, limits)
    with _open(file, limits) as image:
        decoded = _as_rgb(image, file)
        # The file is closed at the end, and an image that needed no conversion is the file's own.
        return decoded.copy() if decoded is image else decoded


def _span(length: int, scaled: int, size: int) -> tuple[float, float]:
    """Where the central `size` of `scaled` pixels lie among the `length` pixels that are scaled to them."""
    start = round((scaled - size) / 2)
    return start * length / scaled, min((start + size) * length / scaled, length)


def _checked(data: bytes, limits: InputLimits) -> ImageFile:
    """The file, within the limits on what it says of itself. Raises InputError."""
    if not data:
        raise InputError("empty_image", "The image has no bytes.")
    if len(data) > limits.max_image_bytes:
        raise InputError(
            "image_too_large",
            f"The image has {len(data)} bytes; at most {limits.max_image_bytes} are accepted.",
        )
    file = read_image_file(data)
    _check_pixels(file.width * file.height, limits.max_pixels)
    return file


@contextmanager
def _open(file: ImageFile, limits: InputLimits) -> Iterator[Image.Image]:
    """An image of which only the header was read. Whatever decoding it raises becomes an InputError."""
    if file.format == "HEIF":
        _open_heic()
    try:
        with Image.open(io.BytesIO(file.data), formats=(file.format,)) as image:
            _check_size(image, limits)
            # All at once: between blocks, by default of 64 KB, the decoder waits for the interpreter. Each
            # strip of a TIFF would read all of the file.
            if len(image.tile) == 1:
                image.decodermaxblock = max(image.decodermaxblock, len(file.data))
            yield image
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError("undecodable_image", NOT_AN_IMAGE) from None
    except MemoryError:
        raise
    except Exception as error:
        # Decoders of damaged files raise whatever they trip over: OSError, SyntaxError, struct.error,
        # IndexError, …
        if isinstance(error, EOFError) or "truncated" in str(error).lower():
            raise InputError(
                "truncated_image", "The image ends before its last pixel; send all of it."
            ) from error
        raise InputError("undecodable_image", NOT_AN_IMAGE) from error


@cache
def _open_heic() -> None:
    """Has Pillow read HEIC, in one thread and without what lies beside the picture."""
    from pillow_heif import register_heif_opener

    register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)


def _check_size(image: Image.Image, limits: InputLimits) -> None:
    most = limits.max_pixels // 2 if _takes_twice(image) else limits.max_pixels
    _check_pixels(image.width * image.height, most)


def _check_pixels(pixels: int, most: int) -> None:
    if pixels > most:
        raise InputError(
            "image_too_large", f"The image has {pixels} pixels; at most {most} are accepted of its kind."
        )


def _takes_twice(image: Image.Image) -> bool:
    """Whether its decoder needs about twice as much memory for a pixel as others do.

    WebP's keeps two more pictures, for animations; a progressive JPEG's all coefficients, here of four inks.
    """
    return image.format == "WEBP" or (image.mode == "CMYK" and "progressive" in image.info)


def _as_rgb(image: Image.Image, file: ImageFile) -> Image.Image:
    """The upright first frame in RGB."""
    if image.mode in ("I", "F", "LAB"):
        detail = (
            f"Images of the mode {image.mode} have no agreed white; convert to RGB or grey of 8 or 16 bits."
        )
        raise InputError("unsupported_image", detail)
    image.load()
    image = _upright(image, file)
    if image.mode.startswith("I;16"):
        image = _eight_bits(image, file.significant_bits)
    elif _has_16_bits(image, file):
        _check_scaled(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        white = Image.new("RGB", image.size, "white")
        for top, bottom in _strips(image.size):
            whole = bottom - top == image.height
            strip = image if whole else image.crop((0, top, image.width, bottom))
            clear = strip if strip.mode == "RGBA" else strip.convert("RGBA")
            white.paste(clear, (0, top), clear.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image, file: ImageFile) -> Image.Image:
    if file.format == "AVIF":
        # Pillow tells there how the file turns its picture.
        with suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        return image
    if file.orientation in _UPRIGHT:
        info, image = image.info, image.transpose(_UPRIGHT[file.orientation])
        image.info = info
    return image


def _eight_bits(image: Image.Image, significant: int | None) -> Image.Image:
    """16-bit grey in 8 bits, scaled, what is transparent white.

    significant: bits of each sample, where the file says so. Values that need fewer than 16 are those of a
    camera or a scanner of 8 to 14 bits, written as they came. Pillow's own conversion clips at 255, and
    nearly everything is white.
    """
    wide = np.asarray(image)
    needed = int(wide.max()).bit_length()
    depths = _DEPTHS if significant is None else (max(1, min(significant, 16)), 16)
    bits = next(depth for depth in depths if depth >= needed)
    most = (1 << bits) - 1
    grey = np.empty(wide.shape, np.uint8)
    transparent = image.info.get("transparency")
    for top, bottom in _strips(image.size):
        strip = wide[top:bottom]
        grey[top:bottom] = (strip.astype(np.uint32) * 255 + most // 2) // most
        if isinstance(transparent, int):
            grey[top:bottom][strip == transparent] = 255
    return Image.fromarray(grey)


def _has_16_bits(image: Image.Image, file: ImageFile) -> bool:
    """Whether the file has 16 bits a channel, of which Pillow keeps the upper 8."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        depths = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
        return 16 in (depths if isinstance(depths, tuple) else (depths,))
    # The depth stands behind the sizes of a PNG's header.
    return file.format == "PNG" and file.data[24] == 16


def _check_scaled(image: Image.Image) -> None:
    colours = [image.getchannel(name) for name in image.getbands() if name != "A"]
    if not any(any(colour.histogram()[_UNSCALED:]) for colour in colours):
        raise InputError(
            "unsupported_image",
            "The image has 16 bits a channel and uses 12 or fewer: it is black. Scale it to all 16.",
        )


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The first row of each strip, and the one behind its last."""
    width, height = size
    rows = max(1, LARGE_PIXELS // width)
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


@dataclass(frozen=True, slots=True)
class Silence:
    """How to see that a text's tokens say nothing: beyond the first `skipped` ones all are of `tokens`.

    tokens: the unknown token and those that every text has, sorted; empty where nothing is ever unknown.
    skipped: tokens in front of the text's own, with the prompt; 0 without a prompt.
    """

    tokens: tuple[int, ...]
    skipped: int


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
        return self.tokens(text)

    def tokens(self, text: str) -> tuple[Prepared, bool]:
        """As cut, of a text that is not checked."""
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

    @property
    def silence(self) -> Silence:
        """knows_nothing as data, for programs that have the tokens alone."""
        prompt, skipped = self.transform.prompt, 0
        if prompt:
            first, second, alone = (self._encode(text)[0] for text in (f"{prompt}a", f"{prompt}b", "a"))
            skipped = min(_common(first, second), len(first) - _common(first[::-1], alone[::-1]))
        return Silence(tuple(sorted(self._idle)), skipped)

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


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of the first tokens are the same."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


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
