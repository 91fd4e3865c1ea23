"""The threads of a run: found by who starts them, and kept off their caller's core."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.runtime.affinity import IntraOpThreads, capture_new_threads
from models.runtime.session import open_session
from models.spec import GRAPH_FILE
from tests.support.models import tiny_backbones

CORES = os.sched_getaffinity(0)


@pytest.fixture
def waiting() -> Iterator[threading.Event]:
    """The event that threads of a test wait for."""
    event = threading.Event()
    yield event
    event.set()


def name() -> str:
    return Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text()


def started(event: threading.Event) -> int:
    thread = threading.Thread(target=event.wait, daemon=True)
    thread.start()
    assert thread.native_id is not None
    return thread.native_id


def test_threads_are_gathered_that_this_one_starts_meanwhile(waiting: threading.Event) -> None:
    others: list[int] = []
    before = name()
    started(waiting)
    with capture_new_threads() as first:
        own = [started(waiting), started(waiting)]
        other = threading.Thread(target=lambda: others.append(started(waiting)))
        # As a thread that was there before would start it: with another name.
        beside = threading.Thread(target=lambda: renamed("beside", other))
        beside.start()
        beside.join()
    with capture_new_threads() as second:
        pass
    assert sorted(first) == sorted(own)
    assert others
    assert second == []
    assert name() == before


def renamed(text: str, then: threading.Thread) -> None:
    Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(text)
    then.start()
    then.join()


def test_a_name_is_given_back_after_an_error() -> None:
    before = name()
    with pytest.raises(ZeroDivisionError), capture_new_threads():
        raise ZeroDivisionError
    assert name() == before


@pytest.mark.skipif(len(CORES) < 2, reason="one core")
def test_the_threads_of_a_run_leave_their_callers_core_to_it(tmp_path: Path) -> None:
    backbone = tiny_backbones.text_backbone(tmp_path)
    session = open_session(backbone.path / GRAPH_FILE, device="cpu", threads=2)
    (helper,) = session.crew.threads
    for core in (min(CORES), max(CORES), min(CORES)):
        try:
            os.sched_setaffinity(0, {core})
            session.crew.make_room()
        finally:
            os.sched_setaffinity(0, CORES)
        assert os.sched_getaffinity(helper) == CORES - {core}


def test_a_session_of_one_thread_has_none_beside(tmp_path: Path) -> None:
    backbone = tiny_backbones.text_backbone(tmp_path)
    session = open_session(backbone.path / GRAPH_FILE, device="cpu", threads=1)
    assert session.crew.threads == ()
    session.crew.make_room()


def test_a_thread_that_is_gone_is_no_error(waiting: threading.Event) -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert thread.native_id is not None
    IntraOpThreads([thread.native_id]).make_room()
