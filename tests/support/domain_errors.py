"""Every class of errors that the domain raises."""

from __future__ import annotations

import importlib
import pkgutil

import adapters
import models
from adapters.storage.artifact import StoreError
from models.errors import CodedError, DomainError
from service.errors import STATUSES

# These run in a process of their own, or need an optional library.
_NOT_IMPORTED = {"models.export.onnx_export", "adapters.storage.bucket", "adapters.workers.ray_place"}


def domain_errors() -> list[type[DomainError]]:
    """Every class of errors of models/ and adapters/, but the kinds and the groups."""
    for package in (models, adapters):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if ".migrations" not in module.name and module.name not in _NOT_IMPORTED:
                importlib.import_module(module.name)
    found: set[type[DomainError]] = set()
    pending = [DomainError]
    while pending:
        below = pending.pop().__subclasses__()
        found.update(below)
        pending.extend(below)
    ours = {cls for cls in found if cls.__module__.startswith(("models.", "adapters."))}
    return sorted(ours - {*STATUSES, CodedError, StoreError}, key=lambda cls: cls.__name__)


DOMAIN_ERRORS = domain_errors()
