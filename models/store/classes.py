"""The classifier that an image network was trained with, kept beside its export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from models.arrays import Floats
from models.spec import CLASSES_FILE
from models.store.manifest import CorruptExport


@dataclass(frozen=True, slots=True)
class Classes:
    """A linear classifier of embeddings: its logits are `embeddings @ weight.T + bias`."""

    weight: Floats  # float32 (classes, dim)
    bias: Floats  # float32 (classes,)
    names: tuple[str, ...]  # one per class; synonyms are separated by ", "


def write_classes(folder: Path, classes: Classes) -> None:
    """Write the classifier into an export folder, in half precision."""
    np.savez_compressed(
        folder / CLASSES_FILE,
        weight=classes.weight.astype(np.float16),
        bias=classes.bias.astype(np.float16),
        names=np.array(classes.names),
    )


def read_classes(export: Path) -> Classes | None:
    """The classifier of an export, None if it has none, as those of texts and of users' own backbones.

    The export's manifest must have been read before. Raises CorruptExport.
    """
    path = export / CLASSES_FILE
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            weight, bias = stored["weight"].astype(np.float32), stored["bias"].astype(np.float32)
            names = tuple(str(name) for name in stored["names"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise CorruptExport(
            f"{path} is not a classifier of images ({error}). Export the backbone again."
        ) from error
    if weight.ndim != 2 or bias.shape != (len(names),) or len(weight) != len(names):
        raise CorruptExport(f"{path} has arrays that do not fit each other. Export the backbone again.")
    return Classes(weight, bias, names)
