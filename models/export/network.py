"""A backbone's network as loaded by its own library, before its export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from models.arrays import Floats
from models.spec import BackboneSpec
from models.store.classes import Classes


@dataclass(frozen=True, slots=True)
class Network:
    """A network in evaluation mode, with its own library's way to embed inputs."""

    spec: BackboneSpec
    # Torch module that takes pixels, or ids and mask, and returns embeddings; None if there is only a graph.
    forward: Any
    # Takes encoded images or texts and embeds them with the library's own preprocessing.
    reference: Callable[[Sequence[Any]], Floats]
    tokenizer: bytes | None = None  # tokenizer.json of a text network
    words: Any = None  # embedding layer of a text network, with a row per word piece
    classes: Classes | None = None  # classifier that a packaged image network was trained with
    graph: bytes | None = None  # ONNX model, with the inputs and the output of every export
    pieces: bytes | None = None  # contents of the pieces file, if there is one
