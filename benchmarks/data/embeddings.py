"""Embeddings by an exported backbone, without a service, kept on disk between runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import datasets
from benchmarks.data.datasets import Kind, Sample
from models.arrays import Doubles, Floats
from models.backbone import Backbone
from models.spec import PACKAGED
from models.store.exports import find
from models.store.manifest import read_manifest

BACKBONES: Mapping[Kind, str] = {"text": "minilm-l6-v2", "image": "efficientnet-lite0"}
"""The backbone of each kind where a benchmark does not name another."""

# Long posts make embedding slow, and their beginnings are enough to tell groups apart.
CHARACTERS = 400
_TOGETHER = 512  # inputs that are embedded between two lines of progress


class NotExported(RuntimeError):
    """The backbone is not in the model store."""

    code = "not_exported"


@dataclass(frozen=True, slots=True)
class EmbeddedSet:
    """The first n samples of a set in its stratified order of seed 0."""

    name: str
    rows: Floats  # float32 (n, dim)
    labels: NDArray[np.str_]  # (n,)
    values: Doubles  # (n,), NaN where the set has no numbers


def embed(backbone: str, inputs: Sequence[bytes | str]) -> Floats:
    """Return the embeddings, float32 (n, dim); texts are cut to CHARACTERS. Raises NotExported."""
    loaded = Backbone.open(export_of(backbone), threads=2)
    short = [one[:CHARACTERS] if isinstance(one, str) else one for one in inputs]
    parts = []
    for begin in range(0, len(short), _TOGETHER):
        print(f"embedding {begin} of {len(short)} inputs with {backbone}", flush=True)
        parts.append(loaded.embed(short[begin : begin + _TOGETHER]).embeddings)
    return np.concatenate(parts)


def embedded(name: str, folder: Path, *, most: int, backbone: str) -> EmbeddedSet:
    """Return the set's first samples, at most `most`; what was embedded before is read from the folder.

    Raises NotExported where something is left to embed.
    """
    path = folder / "embeddings" / f"{name}-{_fingerprint(backbone)[:16]}.npz"
    kept = _kept(path)
    if kept is None or len(kept["rows"]) < min(most, int(kept["size"])):
        kept = _more(path, kept, datasets.load(name, folder).samples, most, backbone)
    return EmbeddedSet(name, kept["rows"][:most], kept["labels"][:most], kept["values"][:most])


def _more(
    path: Path,
    kept: Mapping[str, NDArray[Any]] | None,
    samples: Sequence[Sample],
    most: int,
    backbone: str,
) -> dict[str, NDArray[Any]]:
    """Embed what is missing, and keep it."""
    chosen = datasets.stratified_order(samples, 0)[:most]
    rows = [] if kept is None else [kept["rows"]]
    done = sum(map(len, rows))
    rows.append(embed(backbone, [sample.input for sample in chosen[done:]]))
    whole = {
        "rows": np.concatenate(rows),
        "labels": np.array([sample.label for sample in chosen]),
        "values": np.array([sample.value for sample in chosen]),
        "size": np.array(len(samples)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(scratch, allow_pickle=False, **whole)
    scratch.replace(path)
    return whole


def _kept(path: Path) -> dict[str, NDArray[Any]] | None:
    if not path.exists():
        return None
    with np.load(path) as arrays:
        return dict(arrays.items())


def export_of(backbone: str) -> Path:
    """The backbone's export in the model store. Raises NotExported."""
    export = find(backbone)
    if export is None:
        raise NotExported(f"{backbone} is not exported; run `python -m models.export {backbone}`.")
    return export


def _fingerprint(backbone: str) -> str:
    if backbone in PACKAGED:
        return PACKAGED[backbone].fingerprint
    return read_manifest(export_of(backbone), verify=False).fingerprint
