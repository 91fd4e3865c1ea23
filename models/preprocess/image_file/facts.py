"""What is known of an image's file before it is decoded."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from models.preprocess.limits import InputError

READABLE = "JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF and, with `topwork[heic]` installed, HEIC"
"""The readable formats, for use in messages."""
NOT_AN_IMAGE = f"This is not an image that can be read. Send {READABLE}."
# Images above these sizes are decoded in another process; see models/preprocess/decoder.py.
LARGE_PIXELS = 4_000_000
_LARGE_BYTES = 4 << 20
# Errors raised by reading beyond the end of the data.
DAMAGED = (struct.error, IndexError, OverflowError)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image that has not been decoded yet."""

    format: str  # Pillow's name
    width: int  # largest declared in the file, in pixels
    height: int  # largest declared in the file, in pixels
    data: bytes  # the file without its metadata
    orientation: int = 1  # 1 to 8, from EXIF or XMP; always 1 if the decoder applies it
    significant_bits: int | None = None  # bits used per sample of a PNG, from sBIT; None without
    work: int = 0  # pixels that the decoder processes
    doubtful: bool = False  # the cost cannot be predicted from the size

    @property
    def large(self) -> bool:
        """Whether the image must be decoded in another process."""
        return self.doubtful or self.work > LARGE_PIXELS or len(self.data) > _LARGE_BYTES


def odd(what: str) -> InputError:
    """The error for a structure that only a hostile file has."""
    return InputError(
        "input_too_costly", f"The image has {what}, which no camera or program writes. Save it again."
    )
