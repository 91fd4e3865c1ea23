"""A child process that is told to end, one that does not listen, and one that is silent."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from adapters.processes import heartbeat
from adapters.processes.child import ChildProcess, child_environment
from adapters.processes.heartbeat import LOOK_SECONDS
from tests.support.processes import stop


@pytest.fixture
def child() -> Iterator[ChildProcess]:
    """A fitting process that is ready."""
    child = ChildProcess(
        "child", "adapters.processes.fit_server", environment=child_environment(), stdout=subprocess.PIPE
    )
    assert child.stdout.read(1)
    yield child
    child.end()


def test_a_child_ends_by_itself_once_its_input_closes(child: ChildProcess) -> None:
    assert child.poll() is None
    child.end(patience=20.0)
    assert child.poll() == 0
    child.end()


def test_a_child_that_does_not_end_is_killed(child: ChildProcess) -> None:
    stop(child.pid)
    child.end(patience=0.2)
    assert child.poll() == -signal.SIGKILL


def test_a_silent_child_is_killed(child: ChildProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_SILENT_SECONDS", 1.5)
    end = time.monotonic() + 2.0
    while time.monotonic() < end:
        child.kill_if_silent()
        time.sleep(LOOK_SECONDS)
    assert child.poll() is None
    stop(child.pid)
    end = time.monotonic() + 30.0
    while child.poll() is None:
        assert time.monotonic() < end
        child.kill_if_silent()
        time.sleep(LOOK_SECONDS)
    assert child.poll() == -signal.SIGKILL


def test_a_child_that_cannot_be_started_leaves_no_descriptor_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(subprocess, "Popen", refused)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BlockingIOError) as error:
        ChildProcess("child", "adapters.processes.fit_server", environment={})
    assert len(os.listdir("/proc/self/fd")) == before
    # The traceback keeps the object alive: it was not the garbage collector that closed the pipe.
    assert error.traceback
