"""What all request bodies share: exact types, no unknown fields, and null for what is left out."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import islice
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
"""Names of adapters and tenants."""
BIGGEST = 2**31 - 1
"""Largest version, epoch or revision number that every supported database can store."""
# pydantic makes an error of each unknown field, and holds the GIL until it has made all of them.
_MOST_UNKNOWN = 20


class Request(BaseModel):
    """Common to all requests: exact types, no unknown fields. null is as good as leaving a field out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _tidied(cls, value: Any) -> Any:
        fields = cls.model_fields
        return tidied(value, fields, lambda name: not fields[name].is_required())


def tidied(value: Any, known: Collection[str], is_optional: Callable[[str], bool] = lambda name: True) -> Any:
    """Return a JSON object without null in optional fields, and with its first unknown fields only.

    `known`: the names of its fields. Any other value is returned as it is, for validation to refuse it.
    """
    if not isinstance(value, dict):
        return value
    if None in value.values():
        value = {
            name: one
            for name, one in value.items()
            if one is not None or name not in known or not is_optional(name)
        }
    if len(value) > len(known) + _MOST_UNKNOWN:
        unknown = set(islice((name for name in value if name not in known), _MOST_UNKNOWN))
        value = {name: one for name, one in value.items() if name in known or name in unknown}
    return value
