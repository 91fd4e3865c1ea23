"""Files beside a head: what is written is read again, and anything else is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save

from adapters.examples.target import Target
from adapters.storage.artifact import CorruptArtifact
from adapters.storage.formats import (
    Evidence,
    History,
    decode_embeddings,
    decode_evidence,
    decode_inputs,
    encode_embeddings,
    encode_evidence,
    encode_inputs,
)


def test_embeddings_come_back_bit_by_bit() -> None:
    embeddings = np.random.default_rng(0).normal(size=(7, 33)).astype(np.float32)
    assert np.array_equal(decode_embeddings(encode_embeddings(embeddings, "f" * 64)), embeddings)


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=20))
def test_images_come_back_in_order(inputs: list[bytes]) -> None:
    assert decode_inputs(bytes(encode_inputs(inputs))) == inputs


@given(st.lists(st.text(max_size=50), min_size=1, max_size=20))
def test_texts_come_back_in_order(inputs: list[str]) -> None:
    assert decode_inputs(bytes(encode_inputs(inputs))) == inputs


@pytest.mark.parametrize("targets", [("cat", "Käfer"), (("a", "b"), ()), (1.5, -2.0)])
def test_evidence_comes_back(targets: tuple[Target, ...]) -> None:
    scores = np.array([1.0, np.nan], np.float32)
    evidence = Evidence(("a/1", "ü"), ("0" * 64, "ab" * 32), targets, scores)
    found = decode_evidence(encode_evidence(evidence))
    assert (found.ids, found.digests, found.targets) == (evidence.ids, evidence.digests, targets)
    assert np.array_equal(found.scores, scores, equal_nan=True)


def test_evidence_comes_back_with_its_history() -> None:
    numbers = np.array([1.0, np.nan], np.float32)
    history = History(numbers, numbers * np.float32(0.5), np.array([7, 0]), 3, numbers)
    evidence = Evidence(("a", "b"), ("0" * 64, "1" * 64), ("x", "y"), numbers, (True, False), history)
    found = decode_evidence(encode_evidence(evidence))
    assert found.sampled == (True, False)
    assert found.measured.tolist() == [True, False]
    assert found.history is not None
    assert found.history.best == 3
    assert found.history.asked.tolist() == [7, 0]
    for name in ("agreed", "expected", "best_scores"):
        assert np.array_equal(getattr(found.history, name), getattr(history, name), equal_nan=True)


def test_evidence_of_the_first_releases_has_no_history() -> None:
    listed = json.dumps({"ids": ["a"], "targets": ["x"]}).encode()
    tensors: dict[str, NDArray[Any]] = {
        "listed": np.frombuffer(listed, np.uint8),
        "digests": np.zeros(32, np.uint8),
        "scores": np.ones(1, np.float32),
    }
    found = decode_evidence(save(tensors, {"format": "topwork.evidence/1"}))
    assert (found.sampled, found.history) == ((), None)
    assert found.measured.tolist() == [True]


def test_a_file_of_another_kind_is_refused() -> None:
    data = bytes(encode_inputs(["a"]))
    with pytest.raises(CorruptArtifact, match=r"topwork\.inputs"):
        decode_embeddings(data)
    with pytest.raises(CorruptArtifact):
        decode_evidence(b"not safetensors at all")
    with pytest.raises(CorruptArtifact):
        decode_inputs(b"")
