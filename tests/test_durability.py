"""Acknowledged writes survive SIGKILL. All 200 kills: `make test-kill`."""

from __future__ import annotations

from pathlib import Path

from benchmarks.reliability.kill import run


def test_nothing_acknowledged_is_lost_when_the_service_is_killed(tmp_path: Path) -> None:
    found = run(4, seed=11, home=tmp_path / "home")
    assert found.sound, found
    assert found.acknowledged > 0
    assert found.killed_during_a_request > 0
