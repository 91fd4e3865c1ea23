"""What a tenant says of the labels themselves: what each means, and what it costs to miss it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from adapters.examples.target import ExampleError, normalise_label
from adapters.examples.validation import find_clash
from models.errors import CodedError, Invalid

DESCRIPTION_CHARACTERS: Final = 1_000  # of one label
MEANINGS_CHARACTERS: Final = 50_000  # of all labels and descriptions of an adapter together
COST_CHARACTERS: Final = 20_000  # of all labels with a cost
SMALLEST_COST: Final = 0.001
LARGEST_COST: Final = 1_000.0

# Where a name like "order_status", "order-status", "order.status" or "orderStatus" has a new word.
_JOINTS = re.compile(r"[_\W]+|(?<=[^\W\d_A-Z])(?=[A-Z])")


class LabelsInvalid(CodedError, Invalid):
    """`labels` or `weights` says something of a label that cannot be used.

    `code` is stable: label_invalid, label_missing, label_too_long, label_collision, description_invalid,
    labels_too_long. `errors` has a pointer to the label, if it is one.
    """

    def __init__(self, code: str, detail: str, pointer: str | None = None) -> None:
        super().__init__(code, detail)
        if pointer is not None:
            self.errors = [{"pointer": pointer, "code": code, "detail": detail}]


def read_meanings(given: Mapping[str, str | None] | Sequence[str]) -> dict[str, str]:
    """Return the description of each label, "" where its name alone is given, sorted by label.

    `given`: descriptions by label, or names alone. Raises LabelsInvalid.
    """
    found: dict[str, str] = {}
    pairs: Iterable[tuple[str | int, str, str | None]] = (
        ((label, label, description) for label, description in given.items())
        if isinstance(given, Mapping)
        else ((index, label, None) for index, label in enumerate(given))
    )
    for place, label, description in pairs:
        pointer = _pointer("labels", place)
        name = _name(label, pointer)
        if name in found:
            raise LabelsInvalid(
                "label_collision", f"The label {name!r} is given twice. Give it once.", pointer
            )
        found[name] = "" if description is None else _description(name, description, pointer)
    _check_length(found, "labels", MEANINGS_CHARACTERS)
    check_spelling(found, ())
    return dict(sorted(found.items()))


def read_costs(given: Mapping[str, float]) -> dict[str, float]:
    """Return the cost of each label, sorted by label. Raises LabelsInvalid."""
    found: dict[str, float] = {}
    for label, cost in given.items():
        pointer = _pointer("weights", label)
        name = _name(label, pointer)
        if name in found:
            raise LabelsInvalid(
                "label_collision", f"The label {name!r} is given twice. Give it once.", pointer
            )
        found[name] = float(cost)
    _check_length(dict.fromkeys(found, ""), "weights", COST_CHARACTERS)
    return dict(sorted(found.items()))


def check_spelling(meanings: Iterable[str], known: Iterable[str]) -> None:
    """Raise LabelsInvalid (label_collision) if a label looks like another with other characters."""
    clash = find_clash([*known, *meanings])
    if clash is not None:
        raise LabelsInvalid(
            "label_collision",
            f"The label {clash[0]!r} looks like {clash[1]!r} but has other characters. Use one spelling.",
        )


def readable(label: str, description: str = "") -> str:
    """Return the text that is read for a label: its description, or its name as words.

    >>> readable("card_arrival"), readable("orderStatus"), readable("spam", "unwanted mail")
    ('card arrival', 'order Status', 'unwanted mail')
    """
    return description or " ".join(word for word in _JOINTS.split(label) if word) or label


def _name(label: str, pointer: str) -> str:
    try:
        return normalise_label(label)
    except ExampleError as error:
        raise LabelsInvalid(error.code, error.detail, pointer) from error


def _description(label: str, description: str, pointer: str) -> str:
    # Normalising is quadratic in runs of combining marks, so the length is bounded first.
    if len(description) > DESCRIPTION_CHARACTERS:
        raise LabelsInvalid(
            "description_invalid",
            f"The description of {label!r} has more than {DESCRIPTION_CHARACTERS:,} characters. Shorten it.",
            pointer,
        )
    text = unicodedata.normalize("NFC", description).strip()
    if not text:
        raise LabelsInvalid(
            "description_invalid",
            f"The description of {label!r} is empty. Send null if there is none.",
            pointer,
        )
    if any(character == "\0" or unicodedata.category(character) == "Cs" for character in text):
        raise LabelsInvalid(
            "description_invalid",
            f"The description of {label!r} has a NUL or half of a surrogate pair. Send plain text.",
            pointer,
        )
    return text


def _check_length(texts: Mapping[str, str], field: str, most: int) -> None:
    if sum(len(label) + len(description) for label, description in texts.items()) > most:
        raise LabelsInvalid(
            "labels_too_long",
            f"All texts in `{field}` together have at most {most:,} characters. Shorten them.",
            f"/{field}",
        )


def _pointer(field: str, place: str | int) -> str:
    return f"/{field}/" + str(place).replace("~", "~0").replace("/", "~1")
