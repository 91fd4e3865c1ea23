"""Makes a named place fail once, in whichever process of a service comes there first.

A test puts this folder on PYTHONPATH of the service that it starts, whose children inherit it; the product
knows nothing of it. What is to fail is written into the file `armed` of the folder TOPWORK_FAILING, as a name
and an action; who comes there renames the file to `fired`, so that it happens once.
"""

from __future__ import annotations

import errno
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = os.environ.get("TOPWORK_FAILING")
PLACES = {} if FOLDER is None else json.loads(Path(__file__).with_name("places.json").read_text())


def _sqlite_error(action: str) -> Exception:
    import sqlite3

    from sqlalchemy.exc import OperationalError

    full = action == "ENOSPC"
    cause = sqlite3.OperationalError("database or disk is full" if full else "disk I/O error")
    cause.sqlite_errorcode = sqlite3.SQLITE_FULL if full else sqlite3.SQLITE_IOERR
    return OperationalError("a statement", None, cause)


def _registry_error(action: str) -> Exception:
    from adapters.registry.errors import RegistryUnavailable

    # A full disk makes a commit fail and is never reported after it; the answer may be lost.
    return RegistryUnavailable(f"no answer: {action}")


def _system_error(action: str) -> Exception:
    return OSError(getattr(errno, action), os.strerror(getattr(errno, action)))


ERRORS = {"system": _system_error, "sqlite": _sqlite_error, "registry": _registry_error}


def fail(name: str, kind: str) -> None:
    """Does what is armed for the place, if it is."""
    armed = Path(FOLDER or "", "armed")
    try:
        wanted, action = armed.read_text().split()
        if wanted != name:
            return
        armed.rename(armed.with_name("fired"))
    except (FileNotFoundError, ValueError):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stall":
        time.sleep(5.0)
    else:
        raise ERRORS[kind](action)


def _wrapped(function: Any, before: str | None, after: str | None, kind: str) -> Any:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if before is not None:
            fail(before, kind)
        result = function(*arguments, **named)
        if after is not None:
            fail(after, kind)
        return result

    return call


def _wrap(module: Any) -> None:
    for path, kind in PLACES[module.__name__].items():
        owner = module
        *parents, last = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        found = owner.__dict__[last]
        static = isinstance(found, staticmethod)
        name = f"{module.__name__}.{path}"
        wrapped = _wrapped(found.__func__ if static else found, f"{name}:before", f"{name}:after", kind)
        setattr(owner, last, staticmethod(wrapped) if static else wrapped)


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: Any) -> None:
        super().exec_module(module)
        _wrap(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in PLACES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


if PLACES:
    sys.meta_path.insert(0, _Finder())
