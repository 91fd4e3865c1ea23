"""Input limits, and the error for an input that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass

from models.errors import CodedError, Invalid


class InputError(CodedError, Invalid):
    """One input cannot be used; the others of its batch are not affected.

    `code` is one of undecodable_image, truncated_image, image_too_large, empty_image, unsupported_image,
    input_too_costly, empty_text, text_too_long, invalid_text, no_known_tokens, wrong_kind. `detail` says what
    to do.
    """


@dataclass(frozen=True, slots=True)
class InputLimits:
    """Limits above which an input is refused."""

    max_image_bytes: int = 16 << 20  # size of the encoded image
    max_pixels: int = 50_000_000  # width times height, as declared in the header
    max_text_chars: int = 100_000
