"""Gaps between layers: in both directions, also after a phase with everything frozen, and gone at the end.

They are longer while another process is at work, and only then.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import torch

from adapters.learner import freeze, unfreeze
from models.yielding import gaps


def test_a_network_pauses_after_each_layer_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    inputs = torch.randn(3, 4)
    with gaps(network):
        freeze(network)
        with torch.inference_mode():
            network(inputs)
        assert len(slept) == 2
        unfreeze(network)
        network(inputs).sum().backward()
        assert len(slept) == 6
    network(inputs).sum().backward()
    assert len(slept) == 6
    assert max(slept) < 1e-3


def test_gaps_are_longer_while_a_process_that_goes_first_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    sleep = time.sleep

    def recorded(seconds: float) -> None:
        slept.append(seconds)
        sleep(seconds)

    network = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 512))
    inputs = torch.randn(4_000, 512)

    def looks() -> int:
        """How often, in ten passes, a gap went on because the other was at work."""
        slept.clear()
        with gaps(network, other.pid):
            for _ in range(10):
                network(inputs)
        assert len(slept) >= 20
        return len(slept) - 20

    with subprocess.Popen(
        [sys.executable, "-c", "print('up', flush=True)\nwhile True: pass"], stdout=-1
    ) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            monkeypatch.setattr(time, "sleep", recorded)
            at_work = looks()
            other.send_signal(signal.SIGSTOP)
            sleep(0.05)
            assert looks() == 0
            assert at_work >= 20
        finally:
            other.kill()
    assert other.wait() == -signal.SIGKILL
    assert looks() == 0
