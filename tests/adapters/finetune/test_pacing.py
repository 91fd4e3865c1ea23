"""Gaps in training: in both directions, between optimizers, also after a phase with everything frozen.

They are gone at the end. They are longer while another process is at work, and only then.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import torch

from adapters.finetune import pacing
from adapters.finetune.model import freeze, unfreeze
from adapters.finetune.pacing import cooperative_pauses

pytestmark = pytest.mark.alone


def test_training_pauses_after_each_layer_in_both_directions_and_after_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(pacing, "_WORK_SECONDS", 0.0)
    network = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU6(inplace=True), torch.nn.Linear(8, 2)
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    inputs = torch.randn(3, 4)
    with cooperative_pauses(network):
        freeze(network)
        with torch.inference_mode():
            network(inputs)
        assert len(slept) == 4
        unfreeze(network)
        loss = network(inputs).sum()
        assert len(slept) == 8
        loss.backward()
        assert len(slept) == 12
        optimizer.step()
        assert len(slept) == 13
    network(inputs).sum().backward()
    optimizer.step()
    assert len(slept) == 13
    assert max(slept) < 1e-3


def test_gaps_change_no_gradient() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU6(inplace=True), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 2)
    )
    inputs = torch.randn(5, 3, 8, 8)

    def gradients() -> list[torch.Tensor]:
        network.zero_grad()
        network(inputs).square().sum().backward()
        return [one.grad.clone() for one in network.parameters()]

    plain = gradients()
    with cooperative_pauses(network):
        for own, other in zip(plain, gradients(), strict=True):
            assert torch.equal(own, other)


def test_nothing_pauses_that_has_hardly_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(pacing, "_WORK_SECONDS", 60.0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    with cooperative_pauses(network):
        network(torch.randn(3, 4)).sum().backward()
    assert slept == []


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
        with cooperative_pauses(network, other.pid):
            for _ in range(10):
                network(inputs)
        assert slept.count(pacing._GAP_SECONDS) == 20
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
