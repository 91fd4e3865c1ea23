"""Periodic work is done by one process, and continues after an unexpected error or a death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from adapters.adaptation.erasure import ErasureSweeper
from adapters.registry.registry import Registry
from adapters.storage.open import open_store
from adapters.storage.sweeper import Swept
from service import background
from tests.support.conditions import until

# Begins a sweep, and hangs in its middle.
SWEEPING = """
import sys, time
from adapters.registry.database import Database
from adapters.registry.upkeep.chores import Chores
with Chores(Database(sys.argv[1]), turn_seconds=3.0).turn("sweep", 3600.0) as turn:
    print("begun" if turn else "refused", flush=True)
    time.sleep(600.0)
"""


def test_the_sweeps_go_on_after_an_unexpected_error(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing = threading.Event()
    turns: list[int] = []

    def swept(store: Any, registry: Any) -> Swept:
        turns.append(len(turns))
        if len(turns) == 1:
            raise PermissionError("a folder of another user")
        closing.set()
        return Swept()

    monkeypatch.setattr(background, "SWEEP_INTERVAL", 0.0)
    monkeypatch.setattr(background, "RETRY_INTERVAL", 0.0)
    monkeypatch.setattr(background, "SWEPT_AGE", -1.0)
    monkeypatch.setattr(background, "sweep", swept)
    background.sweep_artifacts(registry, cast(Any, None), closing)
    assert len(turns) == 2


def test_what_is_erased_is_cleared_after_an_unexpected_error(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing = threading.Event()
    turns: list[int] = []

    def clear(self: Any) -> None:
        turns.append(len(turns))
        if len(turns) == 1:
            raise PermissionError("a folder of another user")
        closing.set()

    monkeypatch.setattr(background, "CLEAR_INTERVAL", 0.0)
    monkeypatch.setattr(ErasureSweeper, "clear", clear)
    background.clear_erasures(registry, cast(Any, None), 1, closing)
    assert len(turns) == 2


def test_one_process_sweeps_and_another_takes_over_when_it_is_killed(
    registry: Registry, registry_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "SWEPT_AGE", -1.0)
    monkeypatch.setattr(background, "LOOK_INTERVAL", 0.05)
    looked = threading.Semaphore(0)
    turn = registry.chores.turn

    def counted(*arguments: Any) -> Any:
        looked.release()
        return turn(*arguments)

    monkeypatch.setattr(registry.chores, "turn", counted)
    store = open_store(str(tmp_path / "artifacts"))
    (orphan,) = store.publish_all("acme", "0" * 32, [b"nobody's"])
    file = tmp_path / "artifacts" / "acme" / ("0" * 32) / orphan.name
    os.utime(file, (0, 0))
    closing = threading.Event()
    sweeping = threading.Thread(target=background.sweep_artifacts, args=(registry, store, closing))
    command = [sys.executable, "-c", SWEEPING, registry_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            sweeping.start()
            for _ in range(3):
                assert looked.acquire(timeout=30.0)
            assert file.exists()
            process.send_signal(signal.SIGKILL)
            process.wait()
            until(lambda: not file.exists(), 60.0)
        finally:
            process.kill()
            closing.set()
            sweeping.join(30.0)
    done = registry.chores.done("sweep")
    assert done is not None
    # It has been swept once for all, and not again within the hour.
    with registry.chores.turn("sweep", 0.0) as another:
        assert another is None
