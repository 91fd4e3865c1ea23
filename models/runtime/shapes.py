"""Which inputs run together, and the few shapes of runs on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from models.arrays import Prepared
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


def runs_of(rows: Sequence[Prepared], shapes: Sequence[Shape]) -> Iterator[tuple[Shape, list[int]]]:
    """Yield the shape and the rows of each run; texts are sorted by length to reduce padding."""
    order = list(range(len(rows)))
    if not shapes[0].width:
        most = max(shape.rows for shape in shapes)
        while order:
            chosen, order = order[:most], order[most:]
            yield _smallest(shapes, len(chosen), 0), chosen
        return
    order.sort(key=lambda row: -len(rows[row]))
    while order:
        # The first text is the longest.
        widest = _smallest(shapes, 1, len(rows[order[0]])).width
        most = max(shape.rows for shape in shapes if shape.width == widest)
        chosen, order = order[:most], order[most:]
        yield _smallest(shapes, len(chosen), widest), chosen


def chunks_of(rows: Sequence[Prepared], most: int, most_tokens: int | None) -> Iterator[list[int]]:
    """Yield the rows of each run on a CPU. `most_tokens`: per run, padding included; None for images."""
    if most_tokens is None:
        for start in range(0, len(rows), most):
            yield list(range(start, min(start + most, len(rows))))
        return
    # Texts are sorted longest first: a chunk is as wide as its first text, and texts of similar length
    # need little padding.
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    while order:
        fit = max(1, min(most, most_tokens // len(rows[order[0]])))
        chosen, order = order[:fit], order[fit:]
        yield chosen


def _smallest(shapes: Sequence[Shape], rows: int, width: int) -> Shape:
    """The smallest shape with at least these rows and this width."""
    fitting = [shape for shape in shapes if shape.rows >= rows and shape.width >= width]
    return min(fitting, key=lambda shape: (shape.width, shape.rows))
