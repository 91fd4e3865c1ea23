"""Training examples: inputs, labels and targets, checked and normalised."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Sequence
from typing import Literal, cast

from models.errors import CodedError, Invalid

Task = Literal["classification", "multilabel", "regression"]
Target = str | tuple[str, ...] | float
"""A label, the sorted labels of a multilabel example (possibly none), or a number."""

Weights = Literal["none", "balanced"]
"""How labels are weighted: by their frequency in the examples, or equally."""

ANSWER_ACCURACY = 0.95
"""Default accuracy wanted of the answers that are not abstained on, as a share."""
MAX_LABEL_CHARACTERS = 256
_CONTROL_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})


class ExampleError(CodedError, Invalid):
    """An example cannot be used.

    `code` is stable (label_missing, label_invalid, label_too_long, target_missing, target_not_finite,
    target_invalid); `detail` tells the user what to change.
    """


def normalise_label(label: object) -> str:
    """Return the label in Unicode NFC without surrounding white space.

    Labels that look the same become equal. Raises ExampleError for a value that is not text, a blank label,
    control characters or more than 256 characters.
    """
    if not isinstance(label, str):
        raise ExampleError("label_invalid", "A label must be a string.")
    # Normalising is quadratic in runs of combining marks, so the length is bounded first; NFC expands little.
    if len(label) > 4 * MAX_LABEL_CHARACTERS:
        raise ExampleError("label_too_long", f"A label has at most {MAX_LABEL_CHARACTERS} characters.")
    normal = unicodedata.normalize("NFC", label).strip()
    if not normal:
        raise ExampleError("label_missing", "The label is empty; give every example a label.")
    if len(normal) > MAX_LABEL_CHARACTERS:
        raise ExampleError("label_too_long", f"A label has at most {MAX_LABEL_CHARACTERS} characters.")
    if any(unicodedata.category(character) in _CONTROL_CATEGORIES for character in normal):
        raise ExampleError("label_invalid", "A label must not contain control characters or line breaks.")
    return normal


def normalise_target(task: Task, target: object) -> Target:
    """Return the target in the normal form of the task: a label, sorted distinct labels, or a finite float.

    Booleans are not numbers. Raises ExampleError.
    """
    if target is None:
        code = "target_missing" if task == "regression" else "label_missing"
        raise ExampleError(code, f"An example for {task} needs a target.")
    if task == "classification":
        return normalise_label(target)
    if task == "multilabel":
        if isinstance(target, str) or not isinstance(target, Sequence):
            raise ExampleError("label_invalid", "`labels` must be a list of strings; it may be empty.")
        return tuple(sorted({normalise_label(label) for label in target}))
    if isinstance(target, bool) or not isinstance(target, int | float):
        raise ExampleError("target_invalid", "The target of a regression must be a number.")
    try:
        value = float(target)
    except OverflowError:
        value = math.inf
    # Embeddings and targets are fitted in single precision.
    if not math.isfinite(value) or abs(value) > 1e30:
        raise ExampleError("target_not_finite", "The target must be finite and below 1e30.")
    return value


def input_digest(value: bytes | str) -> str:
    """SHA-256 in hex of an input: bytes as they are, texts in NFC and UTF-8. Equal inputs share a fold."""
    data = (
        unicodedata.normalize("NFC", value).encode("utf-8", "surrogatepass")
        if isinstance(value, str)
        else value
    )
    return hashlib.sha256(data).hexdigest()


def labels_of(target: Target) -> tuple[str, ...]:
    """The labels of a target; none for a number."""
    if isinstance(target, str):
        return (target,)
    return target if isinstance(target, tuple) else ()


def label_set(task: Task, targets: Sequence[Target]) -> set[str]:
    """The labels that occur in targets; none for regression."""
    if task == "regression":
        return set()
    if task == "classification":
        return set(cast("Sequence[str]", targets))
    return {label for target in targets for label in cast("tuple[str, ...]", target)}
