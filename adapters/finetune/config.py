"""How a fine-tune trains: the values of a request, with their bounds. Requires no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field, with_config

MOST_BATCH_PIXELS = 64 * 224**2
"""Largest number of pixels in a batch, over all its images. On a GPU they go through the network at once."""


# Constructing it checks only the batch. The API checks all bounds, because pydantic validates this class.
@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True)
class FineTuneConfig:
    """How a network is fine-tuned. See docs/background/fine-tuning.md."""

    epochs: Annotated[
        int, Field(strict=True, ge=1, le=100, description="The most epochs of the whole network (phase 2).")
    ] = 8
    full_size_epochs: Annotated[
        int,
        Field(
            strict=True,
            ge=0,
            le=100,
            description="The last epochs, in which images have the backbone's own size.",
        ),
    ] = 7
    pixels: Annotated[
        int,
        Field(
            strict=True,
            ge=32,
            le=512,
            description="The side of an image in the other epochs, each of which costs a third. batch × "
            "pixels² is at most 64 × 224².",
        ),
    ] = 128
    batch: Annotated[int, Field(strict=True, ge=2, le=64, description="Examples in a step.")] = 16
    head_rate: Annotated[
        float, Field(strict=True, gt=0, le=1, description="Learning rate of the head in phase 2.")
    ] = 1e-3
    backbone_rate: Annotated[
        float,
        Field(
            strict=True,
            gt=0,
            le=0.1,
            description="Learning rate of the network in phase 2, 10 to 100 times smaller.",
        ),
    ] = 1e-4
    patience: Annotated[
        int,
        Field(
            strict=True,
            ge=1,
            le=100,
            description="Epochs without a better held-out loss, in the second half, before phase 2 stops.",
        ),
    ] = 3
    refit: Annotated[
        bool,
        Field(
            strict=True,
            description="Train once more in the best way found, on the examples held out too. Takes as long "
            "again.",
        ),
    ] = True
    seed: Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)] = 0

    def __post_init__(self) -> None:
        """Raise ValueError if a batch of images would not fit into memory."""
        most = MOST_BATCH_PIXELS // self.pixels**2
        if self.batch > most:
            raise ValueError(f"at {self.pixels} pixels a batch has at most {most} images, not {self.batch}")
