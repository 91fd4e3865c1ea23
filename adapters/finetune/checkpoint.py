"""Checkpoint files of a fine-tune, written atomically. Requires torch."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from adapters.finetune.full_phase import Checkpoint, HeldOutResult
from adapters.finetune.model import Score

logger = logging.getLogger("topwork")


def save_checkpoint(path: Path, checkpoint: Checkpoint, about: str) -> bool:
    """Write the checkpoint atomically: a reader finds the last complete one, whenever this process is killed.

    Returns whether it was written. If not, the last one stays: only the epochs after that would be trained
    again.
    """
    numbers = asdict(replace(checkpoint, tensors={}))
    metadata = {"about": about, "numbers": json.dumps(numbers)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors.items()}
    # Equal tensors may share memory, and safetensors refuses to save one tensor under two names.
    seen: set[int] = set()
    for name, value in tensors.items():
        if value.data_ptr() in seen:
            tensors[name] = value.clone()
        seen.add(value.data_ptr())
    # The random name keeps a stopped attempt that is still running from writing to the same file.
    # safetensors writes to a temporary file beside it; in a folder, both are found if this process is killed.
    partial = path.with_suffix(f".{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(mode=0o700)
        whole = partial / path.name
        save_file(tensors, whole, metadata)
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        whole.rename(path)
        return True
    except (OSError, SafetensorError) as error:
        logger.warning("the checkpoint of an epoch cannot be kept: %s", error)
        return False
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_checkpoint(path: Path, about: str) -> Checkpoint | None:
    """Load the checkpoint if there is one of the same work, or return None, also if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("about") != about:
                return None
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        numbers = json.loads(metadata["numbers"])
        scores = {name: Score(**numbers.pop(name)) for name in ("best", "first")}
        measured = _measured(numbers.pop("measured"))
        return Checkpoint(**{**numbers, **scores, "tensors": tensors, "measured": measured})
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        logger.warning("a checkpoint cannot be read, and training starts over: %s", error)
        return None


def _measured(numbers: dict[str, Any] | None) -> HeldOutResult | None:
    if numbers is None:
        return None
    scores = {name: Score(**numbers.pop(name)) for name in ("first", "final")}
    return HeldOutResult(**{**numbers, **scores})
