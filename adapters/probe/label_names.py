"""The names of labels as a linear classifier that has learned nothing from the examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from adapters.heads.scaling import Scaling, Transform
from models.arrays import Bools, Floats, Integers

# Examples that the centre of typical inputs counts as, when it is mixed with the examples' own centre.
_CENTRE_EXAMPLES = 20.0
# Root mean square length of the directions of labels around their mean, from which names alone are calibrated
# (measured on nine sets). A text's embedding has the length one; what images show counts in other units.
_TEXT_LENGTH = 9.0
_IMAGE_LENGTH = 1.2


@dataclass(frozen=True, slots=True)
class LabelNames:
    """What the names of labels say, in the space of a backbone's embeddings after `transform`."""

    # By label, float32 (dim,). Its product with a centred input is the label's logit, on the scale that is
    # usual for names.
    directions: Mapping[str, Floats] = field(default_factory=dict)
    centre: Floats | None = None  # float32 (dim,), mean of typical inputs; None: zeros
    transform: Transform = "none"


def names_of_texts(embeddings: Mapping[str, Floats], centre: Floats) -> LabelNames:
    """Return what the names of labels say of texts: they are texts themselves.

    `embeddings`: by label, float32 (dim,), of what is read for its name. `centre`: float32 (dim,), the mean
    embedding of typical texts. Labels cannot be told apart by fewer than two names.
    """
    if len(embeddings) < 2:
        return LabelNames()
    return LabelNames(_of_length(embeddings, np.stack(list(embeddings.values())), _TEXT_LENGTH), centre)


def names_of_images(
    embeddings: Mapping[str, Floats], classes: Floats, class_weights: Floats, centre: Floats
) -> LabelNames:
    """Return what the names of labels say of images, by the classes that the backbone was trained with.

    A label's direction is the sum of the classes' weights, each as far as its name is likelier to mean this
    label than the others: a softmax over labels of the cosine between names, standardised over all pairs.
    `embeddings`: by label, float32 (d,), of its name, by a backbone for texts. `classes`: float32
    (classes, d), of the names of classes, by the same one. `class_weights`: float32 (classes, dim), of the
    linear classifier. `centre`: float32 (dim,), the mean square root of the embeddings of typical images.

    Directions apply to square roots: first-order, they are the same up to a scale for each dimension, and no
    worse (measured on three sets, beside the exact sum over classes of probabilities).
    """
    if len(embeddings) < 2:
        return LabelNames()
    cosines = _unit(np.stack(list(embeddings.values()))) @ _unit(classes).T
    alike = np.exp((cosines - cosines.mean()) / max(float(cosines.std()), 1e-6))
    meant = alike / alike.sum(axis=0)
    directions = (meant - meant.mean(axis=0)) @ class_weights
    return LabelNames(_of_length(embeddings, directions, _IMAGE_LENGTH), centre, "sqrt")


def _unit(rows: Floats) -> Floats:
    unit: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit


def _of_length(labels: Iterable[str], rows: Floats, length: float) -> dict[str, Floats]:
    """Return the centred rows (labels, dim) by label, scaled to this root mean square length."""
    centred = rows - rows.mean(axis=0)
    usual = math.sqrt(float(np.vdot(centred, centred)) / len(centred))
    scaled = (centred * (length / max(usual, 1e-12))).astype(np.float32)
    return dict(zip(labels, scaled, strict=True))


@dataclass(frozen=True, slots=True)
class NameLogits:
    """The logits that names give features, as weights and biases."""

    known: Bools  # (labels,), which labels have a name
    weight: Floats  # float32 (labels, dim), zero for a label without a name
    bias: Floats  # float32 (labels,)

    def of(self, features: Floats) -> Floats:
        """Return logits, float32 (labels, n), of features (n, dim)."""
        logits: Floats = self.weight @ features.T
        logits += self.bias[:, None]
        return logits


def name_logits(names: LabelNames, labels: Sequence[str], scaling: Scaling, examples: int) -> NameLogits:
    """Return the logits for features of this scaling. `examples`: number that the scaling was made from."""
    dim = len(scaling.mean)
    known = np.array([label in names.directions for label in labels])
    weight = np.zeros((len(labels), dim), dtype=np.float32)
    for row, label in enumerate(labels):
        if known[row]:
            weight[row] = names.directions[label]
    weight[known] -= weight[known].mean(axis=0)
    centre = np.zeros(dim, dtype=np.float32) if names.centre is None else names.centre
    away = (scaling.mean - centre) * np.float32(_CENTRE_EXAMPLES / (_CENTRE_EXAMPLES + examples))
    return NameLogits(known, weight * np.float32(scaling.scale), weight @ away)


def unseen_offset(logits: Floats, hints: Floats, own: Integers, known: Bools) -> float:
    """Return what to add to the logits that names give labels without examples, to compare with the others.

    Each label with a name takes the role of one without examples in turn: its logit is the name's alone. The
    offset gives these labels together as much probability as they have examples. `logits`, `hints`:
    (labels, m), of held-out examples with labels `own` (m,). `known`: (labels,), which have a name.
    """
    if not known.any():
        return 0.0
    top = logits.max(axis=0)
    chances = np.exp(logits - top)
    rest = np.maximum(chances.sum(axis=0) - chances, 1e-12)[known]
    apart = (hints - top)[known] - np.log(rest)
    wanted = float(known[own].sum())
    low, high = -20.0, 20.0
    for _ in range(30):
        middle = 0.5 * (low + high)
        expected = float((1.0 / (1.0 + np.exp(np.clip(-(apart + middle), -60.0, 60.0)))).sum())
        low, high = (middle, high) if expected < wanted else (low, middle)
    return 0.5 * (low + high)
