"""Validates requests against their models; errors point into the request, or reject single items."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from service.errors import INVALID, MOST_ERRORS, Problem, pointer

M = TypeVar("M", bound=BaseModel)
Location = Sequence[str | int]

_TYPES = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
# Error code and wanted type of each field of an item, for items with another type there.
_WANTED = {
    "image": ("invalid_base64", "a string in base64"),
    "text": ("invalid_text", "a string"),
    "label": ("label_invalid", 'a string, such as "3"'),
    "labels": ("label_invalid", "a list of strings"),
    "target": ("target_invalid", "a number"),
    "id": ("id_invalid", "a string"),
    "group": ("group_invalid", "a string"),
    "sampled": ("sampled_invalid", "true or false"),
}
# pydantic's names for an unknown field of a model and of a dataclass.
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


@dataclass(frozen=True, slots=True)
class Fault:
    """Why one item cannot be used."""

    code: str
    detail: str
    place: str  # JSON pointer into the item, without its first slash


def strict(model: type[M], value: Any) -> M:
    """Validate parsed JSON. Raises a 422 Problem whose pointers lead to existing values in the body."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _refusal(_told(model, one, value) for one in _found(error)) from error


def apart(model: type[M], value: Any, items: str, item: type[BaseModel]) -> tuple[M, dict[int, Fault]]:
    """Validate parsed JSON; return the model without its malformed items, and their faults by index.

    `items`: the field that lists the items. `item`: the model of one. Raises a 422 Problem if anything else
    is wrong.
    """
    try:
        return model.model_validate(value), {}
    except ValidationError as error:
        found = _found(error)
        faults: dict[int, Fault] = {}
        for one in found:
            match one["loc"]:
                case (str(field), int(index), *rest) if field == items:
                    if index not in faults:
                        faults[index] = _fault(item, one, rest, value[items][index])
                case _:
                    raise _refusal(_told(model, one, value) for one in found) from error
    good = [one for index, one in enumerate(value[items]) if index not in faults]
    return strict(model, {**value, items: good}), faults


def lax(model: type[M], query: Mapping[str, str], fields: Mapping[str, str] = {}) -> M:
    """Validate a query string and form fields; a field takes precedence over a parameter of the same name.

    Raises a 422 Problem whose pointers begin with /query or /fields.
    """
    try:
        return model.model_validate_strings({**query, **fields}, strict=False)
    except ValidationError as error:
        errors = []
        for one in _found(error):
            name = str(one["loc"][0]) if one["loc"] else ""
            place = "query" if name in query and name not in fields else "fields" if fields else "query"
            if one["type"] == "extra_forbidden" and place == "query":
                errors.append(unknown_parameter(name, model.model_fields))
            else:
                given = query if place == "query" else fields
                told = _told(model, one, given)
                errors.append({**told, "pointer": f"/{place}{told['pointer']}"})
        raise _refusal(errors) from error


def unknown_parameter(name: str, known: Iterable[str]) -> dict[str, str]:
    """Return an entry of `errors` for a query parameter that the route does not have."""
    names = sorted(known)
    there = f"There are: {', '.join(names)}." if names else "There are none here."
    return {
        "pointer": pointer(("query", name)),
        "code": "unknown_parameter",
        "detail": f"There is no query parameter `{name[:100]}`.{_nearest(name, names)} {there}",
    }


def refuse_parameters(names: Iterable[str], known: Iterable[str], *, why: str = "") -> None:
    """Raise a 422 Problem that names the unknown query parameters, if there are any. `why`: its detail."""
    wrong = sorted(set(names) - set(known))
    if wrong:
        raise _refusal((unknown_parameter(name, known) for name in wrong), why)


def _refusal(errors: Iterable[Mapping[str, str]], why: str = "") -> Problem:
    return Problem(422, "invalid_request", why or INVALID, errors=list(islice(errors, MOST_ERRORS)))


def _found(error: ValidationError) -> list[Any]:
    return error.errors(include_url=False, include_context=False, include_input=False)


def _told(model: type[BaseModel], one: Any, value: Any) -> dict[str, str]:
    """Return an entry of `errors`; its pointer leads to the wrong field, or to the object that lacks it."""
    location = one["loc"]
    name = str(location[-1]) if location else ""
    if one["type"] == "missing":
        code, detail = "missing", f"The field `{name}` is missing."
    elif one["type"] in _UNKNOWN:
        known = list(model.model_fields) if len(location) == 1 else []
        code, detail = "unknown_field", f"There is no field `{name[:100]}`.{_nearest(name, known)}"
    else:
        code, detail = str(one["type"]), str(one["msg"])
    return {"pointer": pointer(_there(location, value)), "code": code, "detail": detail}


def _fault(model: type[BaseModel], one: Any, rest: Location, item: Any) -> Fault:
    """Return what is wrong with one item of this model. `rest`: the location within the item."""
    there = _there(rest, item)
    place = pointer(there).removeprefix("/")
    name = str(rest[0]) if rest else ""
    if one["type"] == "extra_forbidden":
        return Fault(
            "unknown_field",
            f"There is no field `{name[:100]}`.{_nearest(name, list(model.model_fields))}",
            place,
        )
    if name not in _WANTED:
        return Fault("not_an_object", f"{_type_of(item)} is not an example or input. Send an object.", place)
    code, wanted = _WANTED[name]
    given = item
    for part in there:
        given = given[part]
    if len(there) > 1:
        wanted = "a string"
    return Fault(code, f"`{'.'.join(map(str, there))}` is {_type_of(given).lower()}; send {wanted}.", place)


def _there(location: Location, value: Any) -> list[str | int]:
    """Return the part of a location that exists in the value, without the names of pydantic's validators."""
    found: list[str | int] = []
    for part in location:
        in_object = isinstance(value, Mapping) and part in value
        in_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if in_object or in_list:
            value = value[part]
            found.append(part)
    return found


def _type_of(value: Any) -> str:
    return _TYPES.get(type(value), "an object" if isinstance(value, dict) else "null").capitalize()


def _nearest(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name[:100], known, 1)
    return f" Did you mean `{found[0]}`?" if found else ""
