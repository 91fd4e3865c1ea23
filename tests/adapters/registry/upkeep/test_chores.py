"""Of all processes that share a database, one at a time has the turn at a chore."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from threading import Barrier

import pytest
from sqlalchemy import select

from adapters.registry.registry import Registry
from adapters.registry.schema import chores
from adapters.registry.upkeep.chores import Chores
from tests.support.conditions import until

# Takes a turn, says so, and ends it when its input ends.
HOLDER = """
import sys
from adapters.registry.database import Database
from adapters.registry.upkeep.chores import Chores
with Chores(Database(sys.argv[1]), turn_seconds=float(sys.argv[2])).turn("sweep", 0.0) as turn:
    print("begun" if turn else "refused", flush=True)
    sys.stdin.read()
print("ended", flush=True)
"""
SECONDS = 1.5  # of a turn in these tests


@contextmanager
def holder(url: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has the turn at the sweep."""
    command = [sys.executable, "-c", HOLDER, url, str(SECONDS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            yield process
        finally:
            process.kill()


def took(registry: Registry, pause: float = 0.0) -> bool:
    """Whether a turn at the sweep could be taken, which has then ended."""
    with registry.chores.turn("sweep", pause) as turn:
        return turn is not None


def due_at(registry: Registry) -> datetime:
    with registry._database.reading() as connection:
        found: datetime = connection.execute(select(chores.c.due_at)).scalar_one()
        return found


def test_one_registry_has_the_turn_and_the_other_has_not(registry: Registry, registry_url: str) -> None:
    other = Registry(registry_url)
    with registry.chores.turn("sweep", 0.0) as turn:
        assert turn is not None
        assert not took(other)
        with other.chores.turn("count", 0.0) as another:
            assert another is not None
    assert took(other, pause=3_600.0)
    # The pause is for all.
    assert not took(registry)
    other.close()


def test_one_of_many_gets_the_turn(registry: Registry) -> None:
    together = Barrier(8)

    def take(_: int) -> bool:
        together.wait()
        return took(registry, pause=3_600.0)

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(take, range(8))) == 1


def test_what_a_turn_found_is_kept_unless_it_failed(registry: Registry) -> None:
    assert registry.chores.done("count") is None
    with registry.chores.turn("count", 0.0) as turn:
        assert turn is not None
        turn.result = "42"
    with pytest.raises(RuntimeError):
        _fail(registry)
    done = registry.chores.done("count")
    assert done is not None
    assert done.result == "42"
    assert 0.0 <= done.age < 60.0
    with registry.chores.turn("count", 0.0) as turn:
        assert turn is None


def _fail(registry: Registry) -> None:
    with registry.chores.turn("count", 0.0) as turn:
        assert turn is not None
        turn.result, turn.pause = "43", 60.0
        raise RuntimeError


def test_a_turn_lasts_as_long_as_its_work(registry: Registry) -> None:
    brief = Chores(registry._database, turn_seconds=3.0)
    with brief.turn("sweep", 0.0) as turn:
        assert turn is not None
        first = due_at(registry)
        until(lambda: (due_at(registry) - first).total_seconds() > 3.0, 60.0)
        assert not took(registry)


def test_another_process_goes_on_for_one_that_was_killed(registry: Registry, registry_url: str) -> None:
    with holder(registry_url) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not took(registry)
        until(lambda: took(registry), 20 * SECONDS)


def test_a_process_that_wakes_up_does_not_end_the_turn_of_another(
    registry: Registry, registry_url: str
) -> None:
    with holder(registry_url) as process:
        process.send_signal(signal.SIGSTOP)
        until(lambda: took(registry, pause=3_600.0), 20 * SECONDS)
        process.send_signal(signal.SIGCONT)
        told, _ = process.communicate("")
        assert told == "ended\n"
        assert not took(registry)
