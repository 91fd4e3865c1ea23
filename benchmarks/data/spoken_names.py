"""What names say of a set's labels, as a head gets it: true names, and names that mean nothing or lie."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from adapters.probe.label_names import LabelNames, names_of_images, names_of_texts
from benchmarks.data.embeddings import BACKBONES, embed, export_of
from benchmarks.data.label_names import LABEL_NAMES
from benchmarks.data.samples import Kind
from models.arrays import Floats
from models.feeds import typical_inputs
from models.store.classes import read_classes
from models.store.manifest import read_manifest

TRUE, SWAPPED, OPAQUE, MISLEADING = "true", "swapped", "opaque", "misleading"
KINDS = (TRUE, SWAPPED, OPAQUE, MISLEADING)
"""Names that fit; those of other labels of the set; codes such as c17; those of another set's labels."""


def names_for(
    name: str, kind: Kind, labels: Sequence[str], folder: Path, what: str, backbone: str = ""
) -> LabelNames:
    """Return what names of this kind (of KINDS) say of the labels of a set, kept in the folder.

    `backbone`: embeds the inputs, the usual one of their kind by default. Raises NotExported.
    """
    backbone = backbone or BACKBONES[kind]
    path = folder / "embeddings" / f"names-{what}-{name}-{backbone}.npz"
    if not path.exists():
        texts = dict(zip(labels, _texts(name, labels, what), strict=True))
        said = _of_texts(texts, backbone) if kind == "text" else _of_images(texts, backbone)
        assert said.centre is not None
        rows = np.stack([said.directions[label] for label in labels])
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, rows=rows, centre=said.centre, transform=said.transform)
    with np.load(path) as kept:
        directions = dict(zip(labels, kept["rows"], strict=True))
        return LabelNames(directions, kept["centre"], "sqrt" if str(kept["transform"]) == "sqrt" else "none")


def _texts(name: str, labels: Sequence[str], what: str) -> list[str]:
    """Return what is read for each label."""
    true = [LABEL_NAMES[name][label] for label in labels]
    if what == TRUE:
        return true
    if what == SWAPPED:
        return [*true[1:], true[0]]
    if what == OPAQUE:
        return [f"c{number + 1}" for number in range(len(labels))]
    others = [text for one in LABEL_NAMES if one != name for text in LABEL_NAMES[one].values()]
    strangers = [text for text in dict.fromkeys(others) if text not in true]
    return strangers[:: max(1, len(strangers) // len(labels))][: len(labels)]


def _of_texts(texts: Mapping[str, str], backbone: str) -> LabelNames:
    vectors = embed(backbone, list(texts.values()))
    return names_of_texts(dict(zip(texts, vectors, strict=True)), _typical(backbone).mean(axis=0))


def _of_images(texts: Mapping[str, str], backbone: str) -> LabelNames:
    classes = read_classes(export_of(backbone))
    assert classes is not None
    vectors = embed(BACKBONES["text"], list(texts.values()))
    centre = np.sqrt(np.maximum(_typical(backbone), 0.0)).mean(axis=0)
    return names_of_images(
        dict(zip(texts, vectors, strict=True)), _class_names(classes.names), classes.weight, centre
    )


@functools.cache
def _class_names(names: tuple[str, ...]) -> Floats:
    return embed(BACKBONES["text"], [name.partition(",")[0] for name in names])


@functools.cache
def _typical(backbone: str) -> Floats:
    return embed(backbone, typical_inputs(read_manifest(export_of(backbone), verify=False).kind))
