"""Validation of posted examples: which can be used, and why the others cannot."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from adapters.examples.target import ExampleError, Target, Task, input_digest, label_set, normalise_target
from models.errors import Invalid
from models.preprocess.limits import InputError
from models.spec import Kind

MAX_NAME_CHARACTERS = 256  # longest id or group
TARGET_FIELDS: Mapping[Task, str] = {
    "classification": "label",
    "multilabel": "labels",
    "regression": "target",
}
"""The field that holds an example's target, by task."""


@dataclass(frozen=True, slots=True)
class PostedExample:
    """One example as it was posted; its place in the request is its index."""

    # Encoded image bytes, a text, or the error that says why there is none or the example cannot be used.
    input: bytes | str | InputError
    target: object = None  # of any type and unchecked, or the ExampleError that says why there is none
    id: str | None = None
    # See Dataset.
    group: str | None = None
    sampled: bool = True
    blamed: str | None = None  # the field an InputError is about, as in RejectedExample; None for the input


@dataclass(frozen=True, slots=True)
class RejectedExample:
    """A posted example that is not used."""

    index: int
    id: str | None
    code: str
    detail: str
    # The part that is wrong, as posted: id, image, text, label, labels, target, group, or a path below one of
    # them (labels/1); "" for the whole example.
    field: str = ""


@dataclass(frozen=True, slots=True)
class ValidExample:
    """An example to keep."""

    id: str
    digest: str
    target: Target
    input: bytes | str | None  # None if the adapter already has it
    index: int | None = None  # place in the request; None if it was not posted
    group: str | None = None
    sampled: bool = True
    excluded: bool = False  # set aside, see ExampleRecord


class MixedInputs(Invalid):
    """A new adapter is given images and texts at once, and no backbone says which are meant."""

    code = "mixed_inputs"

    def __init__(self) -> None:
        super().__init__("The examples are both images and texts. Name a backbone, or send one kind only.")


def kind_of(value: bytes | str) -> Kind:
    """The kind of backbone that takes the input."""
    return "text" if isinstance(value, str) else "image"


def common_kind(inputs: Iterable[bytes | str | InputError]) -> Kind | None:
    """The kind of all readable inputs, or None if there are none. Raises MixedInputs."""
    kinds = {kind_of(value) for value in inputs if not isinstance(value, InputError)}
    if len(kinds) > 1:
        raise MixedInputs
    return kinds.pop() if kinds else None


def wrong_kind(kind: Kind) -> InputError:
    """The error for an input that a backbone of that kind does not take."""
    other = "text" if kind == "image" else "image"
    return InputError("wrong_kind", f"The backbone takes {kind}s, but this is {other}.")


def admit(
    posted: Sequence[PostedExample], *, task: Task, kind: Kind, known_labels: Iterable[str]
) -> tuple[list[ValidExample], list[RejectedExample]]:
    """Return the examples to keep, distinct by id, and the rejected ones, both in posted order.

    An example without an id gets the digest of its input. If an id has two targets, inputs or groups, all its
    examples are rejected, since either could be meant. A label that equals another one only after Unicode
    compatibility normalisation is rejected; the adapter's spelling wins, or else the first one posted.
    """
    admitted: list[ValidExample] = []
    rejected: list[RejectedExample] = []
    for index, example in enumerate(posted):
        verdict = _check(index, example, task, kind)
        if isinstance(verdict, ValidExample):
            admitted.append(verdict)
        else:
            rejected.append(verdict)
    admitted, conflicting = _drop_conflicts(admitted)
    admitted, colliding = drop_collisions(admitted, task, known_labels)
    return admitted, sorted(rejected + conflicting + colliding, key=lambda one: one.index)


def _check(index: int, example: PostedExample, task: Task, kind: Kind) -> ValidExample | RejectedExample:
    field: str = kind if example.blamed is None else example.blamed
    try:
        if isinstance(example.input, InputError):
            raise example.input
        field = ""
        if isinstance(example.target, ExampleError):
            raise example.target
        if kind_of(example.input) != kind:
            field = kind_of(example.input)
            raise wrong_kind(kind)
        field = "id"
        if example.id is not None:
            check_id(example.id)
        field = "group"
        if example.group is not None:
            check_group(example.group)
        field = _sent_as(example.target)
        target = normalise_target(task, example.target)
    except (InputError, ExampleError) as error:
        return RejectedExample(index, example.id, error.code, error.detail, field)
    digest = input_digest(example.input)
    return ValidExample(
        id=digest if example.id is None else example.id,
        digest=digest,
        target=target,
        input=example.input,
        index=index,
        group=example.group,
        sampled=example.sampled,
    )


def check_id(example_id: str) -> None:
    """Raise ExampleError (id_invalid) unless the id is 1 to 256 characters without control characters."""
    _check_name(example_id, "id_invalid", "An id")


def check_group(group: str) -> None:
    """Raise ExampleError (group_invalid) unless the group's name follows the rules for an id."""
    _check_name(group, "group_invalid", "A group")


def _check_name(name: str, code: str, what: str) -> None:
    if not 1 <= len(name) <= MAX_NAME_CHARACTERS:
        raise ExampleError(code, f"{what} has 1 to {MAX_NAME_CHARACTERS} characters.")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise ExampleError(code, f"{what} must not contain control characters.")


def _drop_conflicts(admitted: Sequence[ValidExample]) -> tuple[list[ValidExample], list[RejectedExample]]:
    by_id: dict[str, list[ValidExample]] = defaultdict(list)
    for example in admitted:
        by_id[example.id].append(example)
    kept: list[ValidExample] = []
    rejected: list[RejectedExample] = []
    for same in by_id.values():
        targets = {example.target for example in same}
        if len(targets) > 1:
            text = "The request gives this id more than one label; send the right one only."
            rejected += [
                _reject(example, "conflicting_labels", text, _sent_as(example.target)) for example in same
            ]
        elif len({example.digest for example in same}) > 1:
            text = "The request gives this id more than one input; give each example its own id."
            rejected += [
                _reject(example, "conflicting_inputs", text, "" if example.id == example.digest else "id")
                for example in same
            ]
        elif len({(example.group, example.sampled) for example in same}) > 1:
            text = "The request gives this id more than one `group` or `sampled`; send the right one only."
            rejected += [
                _reject(example, "conflicting_groups", text, "" if example.group is None else "group")
                for example in same
            ]
        else:
            kept.append(same[0])
    return kept, rejected


def drop_collisions(
    admitted: Sequence[ValidExample], task: Task, known_labels: Iterable[str]
) -> tuple[list[ValidExample], list[RejectedExample]]:
    """Split off the examples whose label only looks like a known one or an earlier example's."""
    spelling = {_skeleton(label): label for label in known_labels}
    kept: list[ValidExample] = []
    rejected: list[RejectedExample] = []
    for example in admitted:
        labels = label_set(task, [example.target])
        clash = _first_clash(labels, spelling)
        if clash is None:
            kept.append(example)
            spelling.update((_skeleton(label), label) for label in labels)
        else:
            text = (
                f"The label {clash[0]!r} looks like {clash[1]!r} but has other characters. Use one spelling."
            )
            rejected.append(_reject(example, "label_collision", text, _sent_as(example.target)))
    return kept, rejected


def find_clash(labels: Iterable[str]) -> tuple[str, str] | None:
    """Return a label and another one that looks like it, or None."""
    return _first_clash(set(labels), {})


def _first_clash(labels: Iterable[str], spelling: Mapping[str, str]) -> tuple[str, str] | None:
    own: dict[str, str] = {}
    for label in sorted(labels):
        skeleton = _skeleton(label)
        other = spelling.get(skeleton) or own.setdefault(skeleton, label)
        if other != label:
            return label, other
    return None


def _skeleton(label: str) -> str:
    """The visible form of a label: NFKC, without invisible characters, white space as single spaces.

    Case is kept: "A" and "a" are two classes of handwritten letters.
    """
    visible = "".join(character for character in label if unicodedata.category(character) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", visible).split())


def _sent_as(target: object) -> str:
    """The field in which such a target is sent; "" for none."""
    if target is None:
        return ""
    if isinstance(target, str):
        return "label"
    return "labels" if isinstance(target, Sequence) else "target"


def _reject(example: ValidExample, code: str, detail: str, field: str) -> RejectedExample:
    assert example.index is not None
    return RejectedExample(example.index, example.id, code, detail, field)
