"""Small drawings, encoded, and what the preprocessor makes of them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.preprocess.image import ImagePreprocessor
from models.preprocess.limits import InputError, InputLimits
from models.spec import ImageTransform

# The network sees the picture unchanged, so a test can read colours from the answer.
PLAIN = ImageTransform(size=16, crop=1.0, interpolation="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3)


def drawing(size: tuple[int, int] = (16, 16)) -> Image.Image:
    """A picture with another colour in each corner, which shows how it was turned."""
    corners = np.array([[[250, 10, 10], [10, 250, 10]], [[10, 10, 250], [240, 240, 10]]], np.uint8)
    return Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR)


def encoded(image: Image.Image, fmt: str, **options: Any) -> bytes:
    """The image as a file of the format."""
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def levels(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The network's input: float32 (3, height, width), 0 to 255."""
    return ImagePreprocessor(PLAIN)(data).transpose(2, 0, 1).astype(np.float32)


def refusal(data: bytes, limits: InputLimits = InputLimits()) -> str:
    """The code of the error with which the preprocessor refuses the image."""
    with pytest.raises(InputError) as caught:
        ImagePreprocessor(PLAIN, limits)(data)
    assert caught.value.detail
    return caught.value.code
