"""Gaps between layers: in both directions, also after a phase with everything frozen, and gone at the end."""

from __future__ import annotations

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
