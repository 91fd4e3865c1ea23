"""The square of an image that a network takes."""

from __future__ import annotations

import math

from PIL import Image

from models.spec import FAR_FROM_SQUARE, ImageTransform

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Radius of the widest interpolation filter, Lanczos, in source pixels.
_SUPPORT = 3


def to_square(image: Image.Image, transform: ImageTransform) -> Image.Image:
    """Resize and crop an upright RGB image to the network's square. See ImageTransform.crop_mode."""
    size, resampling = transform.size, INTERPOLATIONS[transform.interpolation]
    if transform.crop_mode == "squash":
        scaled = int(size / transform.crop)
        margin = round((scaled - size) / 2)
        whole = image.resize((scaled, scaled), resampling)
        return whole.crop((margin, margin, margin + size, margin + size))
    if transform.crop_mode == "fold" and max(image.size) >= FAR_FROM_SQUARE * min(image.size):
        return _folded(image, size, resampling)
    return _centre(image, size, int(size / transform.crop), resampling)


def _folded(image: Image.Image, size: int, resampling: Image.Resampling) -> Image.Image:
    """Cut a long image into equal parts: those of a wide one are stacked, those of a tall one side by side.

    There are as many parts as make up about a square, resized to fill it, and at most one per pixel of the
    square's side. So the strip to be cut has about as many pixels as the square, for any shape of the image.
    """
    wide = image.width >= image.height
    parts = min(size, round(math.sqrt(max(image.size) / min(image.size))))
    length, across = size * parts, -(-size // parts)
    strip = image.resize((length, across) if wide else (across, length), resampling)
    square = Image.new("RGB", (size, size))
    for part in range(parts):
        # The strip is shifted for each part; paste() clips whatever lies outside the square.
        along, aside = -size * part, size * part // parts
        square.paste(strip, (along, aside) if wide else (aside, along))
    return square


def _centre(image: Image.Image, size: int, scaled: int, resampling: Image.Resampling) -> Image.Image:
    """Apply torchvision's Resize and CenterCrop, computing only the pixels that are kept.

    Pillow rounds to 8 bits between the passes along rows and columns, so the result equals the reference only
    if the passes are in the same order as when Pillow resizes the whole image. Computing only the crop takes
    a third of the time, and avoids that an image of one by a million pixels becomes 256 by 256 million.
    """
    width, height = image.size
    shorter = min(width, height)
    new_width, new_height = int(scaled * width / shorter), int(scaled * height / shorter)
    left, right = _span(width, new_width, size)
    top, bottom = _span(height, new_height, size)
    if height <= width:
        # In a single call, Pillow reads only the rows that it needs and keeps the same order of passes.
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


def _span(length: int, scaled: int, size: int) -> tuple[float, float]:
    """Start and end, in source pixels, of the central `size` of `scaled` pixels made from `length`."""
    start = round((scaled - size) / 2)
    return start * length / scaled, min((start + size) * length / scaled, length)
