"""Checkpoints of a fine-tune as files: whole or not there. Torch lives here."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from adapters.learner import Score
from adapters.second_phase import Checkpoint

logger = logging.getLogger("topwork")


def save_checkpoint(path: Path, checkpoint: Checkpoint, about: str) -> None:
    """Writes the checkpoint so that a reader finds the last whole one, whenever this is killed.

    Where it cannot be written the last one stays: only what comes after that would be trained again.
    """
    numbers = [checkpoint.epoch, checkpoint.stale]
    scores = [
        value for score in (checkpoint.best, checkpoint.first) for value in (score.loss, score.accuracy)
    ]
    metadata = {"about": about, "numbers": repr(numbers), "scores": " ".join(value.hex() for value in scores)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors.items()}
    # Equal tensors may be one: safetensors refuses to guess which name they go by.
    seen: set[int] = set()
    for name, value in tensors.items():
        if value.data_ptr() in seen:
            tensors[name] = value.clone()
        seen.add(value.data_ptr())
    # A name of its own: an attempt that was stopped meanwhile must not write on in what is this one's by now.
    partial = path.with_suffix(f".{secrets.token_hex(4)}.partial")
    try:
        save_file(tensors, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
    except (OSError, SafetensorError) as error:
        logger.warning("the checkpoint of an epoch cannot be kept: %s", error)
        partial.unlink(missing_ok=True)


def load_checkpoint(path: Path, about: str) -> Checkpoint | None:
    """The checkpoint, if there is one of the same work; what cannot be read is as good as none."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("about") != about:
                return None
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        epoch, stale = (int(part) for part in metadata["numbers"].strip("[]").split(","))
        values = [float.fromhex(part) for part in metadata["scores"].split()]
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        logger.warning("a checkpoint cannot be read, and training starts over: %s", error)
        return None
    return Checkpoint(tensors, epoch, stale, Score(*values[:2]), Score(*values[2:]))
