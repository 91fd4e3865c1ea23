"""Periodic work continues after an unexpected error."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from adapters.adaptation.erasure import ErasureSweeper
from adapters.storage.sweeper import Swept
from service import background

REGISTRY = cast(Any, SimpleNamespace(identity=SimpleNamespace(age=1e9)))


def test_the_sweeps_go_on_after_an_unexpected_error(monkeypatch: pytest.MonkeyPatch) -> None:
    closing = threading.Event()
    turns: list[int] = []

    def sweep(store: Any, registry: Any) -> Swept:
        turns.append(len(turns))
        if len(turns) == 1:
            raise PermissionError("a folder of another user")
        closing.set()
        return Swept()

    monkeypatch.setattr(background, "SWEEP_INTERVAL", 0.0)
    monkeypatch.setattr(background, "sweep", sweep)
    background.sweep_artifacts(REGISTRY, cast(Any, None), closing)
    assert len(turns) == 2


def test_what_is_erased_is_cleared_after_an_unexpected_error(monkeypatch: pytest.MonkeyPatch) -> None:
    closing = threading.Event()
    turns: list[int] = []

    def clear(self: Any) -> None:
        turns.append(len(turns))
        if len(turns) == 1:
            raise PermissionError("a folder of another user")
        closing.set()

    monkeypatch.setattr(background, "CLEAR_INTERVAL", 0.0)
    monkeypatch.setattr(ErasureSweeper, "__init__", lambda *_: None)
    monkeypatch.setattr(ErasureSweeper, "clear", clear)
    background.clear_erasures(REGISTRY, cast(Any, None), closing)
    assert len(turns) == 2
