"""The few shapes in which a network runs on a GPU."""

from __future__ import annotations

from typing import NamedTuple

from models.spec import BackboneSpec, ImageTransform

# Rows per run to choose from. They are few, because each shape permanently holds buffers and, if captured, a
# CUDA graph.
_IMAGE_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
_TEXT_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_WIDTHS = (16, 32, 64, 128, 256)  # tokens per row
_FEW_ROWS = (1, 8, 32)  # rows per run of fine-tuned networks, as there may be many, one per tenant
# Maximum tokens per run, padding included, so that more short texts than long ones fit into a run.
_TOKENS_PER_RUN = 32_768


class Shape(NamedTuple):
    """Rows of a run, and tokens per row; images have a width of 0."""

    rows: int
    width: int

    @property
    def size(self) -> int:
        """The number of tokens or images."""
        return self.rows * max(1, self.width)


def shapes_for(spec: BackboneSpec, batch: int, *, few: bool = False) -> tuple[Shape, ...]:
    """The shapes of a backbone's runs, largest first. `batch`: maximum rows per run."""
    images = isinstance(spec.transform, ImageTransform)
    steps = _FEW_ROWS if few else _IMAGE_ROWS if images else _TEXT_ROWS
    rows = {*(step for step in steps if step < batch), batch}
    if isinstance(spec.transform, ImageTransform):
        found = {Shape(count, 0) for count in rows}
    else:
        longest = spec.transform.max_tokens
        widths = {*(width for width in _WIDTHS if width < longest), longest}
        found = {
            Shape(count, width)
            for count in rows
            for width in widths
            if count == 1 or count * width <= _TOKENS_PER_RUN
        }
    return tuple(sorted(found, key=lambda shape: (-shape.size, -shape.rows)))
