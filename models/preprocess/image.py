"""Encoded images as a backbone's input arrays, with limits and without torch."""

from __future__ import annotations

import base64
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import numpy as np
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

from models.arrays import Prepared
from models.preprocess.decoder import Decoder, Waiting, wait_unseen
from models.preprocess.image_file.facts import LARGE_PIXELS, NOT_AN_IMAGE, ImageFile
from models.preprocess.image_file.reader import read_image_file
from models.preprocess.limits import InputError, InputLimits
from models.preprocess.square import INTERPOLATIONS, to_square
from models.spec import CROP_MODES, ImageTransform

# Plugins are imported here so that Image.open does not import forty others to look for a format.
_PLUGINS = (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
# The AVIF decoder would otherwise start threads of its own.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

# Operations that turn an image upright, by EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Possible bit depths of samples stored in 16 bits: converters of cameras and scanners have 8 to 14.
_DEPTHS = (8, 10, 12, 14, 16)
# An image with 16 bits per channel was not scaled, and is nearly black, if it uses 12 bits or fewer: the
# upper 8 bits of all its samples, which Pillow keeps, are below this.
_UNSCALED = 1 << 4

# A PNG of one pixel.
TINY_IMAGE = base64.b64decode(
    b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNoaGgAAAMEAYFL09IQAAAAAElFTkSuQmCC"
)

# Pillow's process-wide limit is off: it warns at 89 million pixels whatever the operator allows.
# ImagePreprocessor checks its own limit on the header before decoding.
Image.MAX_IMAGE_PIXELS = None

# Python stores the text of each warning shown, and Pillow's texts contain numbers from the image, so memory
# would grow without bound.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Pillow's messages about damaged images belong in the refusal, not in the log.
logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)


class ImagePreprocessor:
    """Encoded image → uint8 (size, size, 3); nearly square images as in timm's evaluation transform.

    Thread-safe. The network normalises the bytes itself. In addition to that transform, EXIF orientation is
    applied, transparency is composited on white, 16-bit grey is scaled to 8 bits, CMYK and grey are converted
    to RGB, and the first frame of an animation is used. Colour profiles are not applied. Large images, and
    those with an unpredictable cost, are decoded in another process.
    """

    def __init__(
        self, transform: ImageTransform, limits: InputLimits = InputLimits(), decoder: Decoder | None = None
    ) -> None:
        """`decoder`: by default the one that all preprocessors of this process share.

        Raises ValueError for an unsupported interpolation or crop mode.
        """
        if transform.interpolation not in INTERPOLATIONS or transform.crop_mode not in CROP_MODES:
            raise ValueError(f"no such preprocessing: {transform.interpolation}, {transform.crop_mode}")
        self.transform = transform
        self.limits = limits
        self._decoder = decoder or Decoder.shared()

    def __call__(self, data: bytes, waiting: Waiting = wait_unseen) -> Prepared:
        """Preprocess one encoded image. Raises InputError.

        If another process decodes it, `waiting(True)` is called before and `waiting(False)` after.
        """
        file = _checked(data, self.limits)
        if file.large:
            square = self._decoder.decode(file, self.transform, self.limits, waiting)
        else:
            square = self.square(file)
        return np.asarray(square)

    def square(self, file: ImageFile) -> Image.Image:
        """Decode in this thread, whatever the size, to the network's RGB square. Raises InputError."""
        with _open(file, self.limits) as image:
            return to_square(_as_rgb(image, file), self.transform)


def rgb(data: bytes, limits: InputLimits = InputLimits()) -> Image.Image:
    """Decode the upright first frame in RGB, as ImagePreprocessor does before resizing. Raises InputError."""
    file = _checked(data, limits)
    with _open(file, limits) as image:
        decoded = _as_rgb(image, file)
        # An image that needed no conversion belongs to the file, which is closed on exit.
        return decoded.copy() if decoded is image else decoded


def _checked(data: bytes, limits: InputLimits) -> ImageFile:
    """Read the file and check its declared size against the limits. Raises InputError."""
    if not data:
        raise InputError("empty_image", "The image has no bytes.")
    if len(data) > limits.max_image_bytes:
        raise InputError(
            "image_too_large",
            f"The image has {len(data):,} bytes; at most {limits.max_image_bytes:,} are allowed.",
        )
    file = read_image_file(data)
    _check_pixels(file.width * file.height, limits.max_pixels)
    return file


@contextmanager
def _open(file: ImageFile, limits: InputLimits) -> Iterator[Image.Image]:
    """Open an image, reading only the header. All decoding errors but MemoryError become InputErrors."""
    if file.format == "HEIF":
        _open_heic()
    try:
        with Image.open(io.BytesIO(file.data), formats=(file.format,)) as image:
            _check_size(image, limits)
            # The decoder gets all data at once, because it waits for the interpreter between blocks, of 64 KB
            # by default. With several tiles, each strip of a TIFF would read the whole file.
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
        # Decoders raise all kinds of errors for damaged files: OSError, SyntaxError, struct.error,
        # IndexError, …
        if isinstance(error, EOFError) or "truncated" in str(error).lower():
            raise InputError(
                "truncated_image", "The image ends before its last pixel. Send the whole file."
            ) from error
        raise InputError("undecodable_image", NOT_AN_IMAGE) from error


@cache
def _open_heic() -> None:
    """Let Pillow read HEIC, in one thread and without thumbnails, depth and auxiliary images."""
    from pillow_heif import register_heif_opener

    register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)


def _check_size(image: Image.Image, limits: InputLimits) -> None:
    most = limits.max_pixels // 2 if _takes_twice(image) else limits.max_pixels
    _check_pixels(image.width * image.height, most)


def _check_pixels(pixels: int, most: int) -> None:
    if pixels > most:
        raise InputError(
            "image_too_large",
            f"The image has {pixels:,} pixels; at most {most:,} are allowed for its format.",
        )


def _takes_twice(image: Image.Image) -> bool:
    """Whether decoding needs about twice as much memory per pixel as other images do.

    The WebP decoder keeps two more images, for animations; the decoder of a progressive JPEG keeps all
    coefficients, of four inks in CMYK.
    """
    return image.format == "WEBP" or (image.mode == "CMYK" and "progressive" in image.info)


def _as_rgb(image: Image.Image, file: ImageFile) -> Image.Image:
    """Decode the upright first frame in RGB."""
    if image.mode in ("I", "F", "LAB"):
        detail = (
            f"Images of mode {image.mode} have no defined white. Convert to RGB, or grey with 8 or 16 bits."
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
        # Pillow reports the rotation of an AVIF file as an EXIF orientation.
        with suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        return image
    if file.orientation in _UPRIGHT:
        info, image = image.info, image.transpose(_UPRIGHT[file.orientation])
        image.info = info
    return image


def _eight_bits(image: Image.Image, significant: int | None) -> Image.Image:
    """Scale 16-bit grey to 8 bits, with transparent pixels in white.

    `significant`: bits per sample, if the file declares them. Values that need fewer than 16 bits come
    unscaled from a camera or scanner with 8 to 14 bits. Pillow's own conversion clips at 255, so nearly
    everything would be white.
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
    """Whether the file has 16 bits per channel, of which Pillow keeps the upper 8."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        depths = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
        return 16 in (depths if isinstance(depths, tuple) else (depths,))
    # The bit depth follows the width and the height in a PNG's header.
    return file.format == "PNG" and file.data[24] == 16


def _check_scaled(image: Image.Image) -> None:
    colours = [image.getchannel(name) for name in image.getbands() if name != "A"]
    if not any(any(colour.histogram()[_UNSCALED:]) for colour in colours):
        raise InputError(
            "unsupported_image",
            "The image has 16 bits per channel but uses 12 or fewer, so it is black. Scale it to 16.",
        )


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the first row of each strip, and the row after its last."""
    width, height = size
    rows = max(1, LARGE_PIXELS // width)
    for top in range(0, height, rows):
        yield top, min(top + rows, height)
