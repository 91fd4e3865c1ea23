"""A head's nodes behind a backbone: what they decide, beside Head.predict."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from adapters.heads.abstention import AbstentionRule
from adapters.heads.answers import NO_ALARM
from adapters.heads.head import Head
from adapters.heads.novelty import fit_region
from adapters.heads.onnx import append_head
from adapters.heads.scaling import Scaling
from models.preprocess.text import Silence, TextPreprocessor
from models.protobuf import InvalidGraph
from models.spec import GRAPH_FILE, TOKENIZER_FILE, TextTransform
from tests.support.models import tiny_backbones

DIM = tiny_backbones.TEXT_DIM


def head_of(task: Literal["classification", "multilabel", "regression"], **more: Any) -> Head:
    """Seeded weights for two labels, or for a value."""
    rng = np.random.default_rng(5)
    labels = () if task == "regression" else ("a", "b")
    outputs = max(1, len(labels))
    return Head(
        task=task,
        fingerprint="f" * 64,
        labels=labels,
        scaling=Scaling("none", rng.normal(0, 0.1, DIM).astype(np.float32), 0.7),
        weight=rng.normal(0, 3, (outputs, DIM)).astype(np.float32),
        bias=rng.normal(0, 1, outputs).astype(np.float32),
        decisions=np.array([0.3, 0.6], np.float32) if task == "multilabel" else np.zeros(0, np.float32),
        **more,
    )


def run(model: bytes, feed: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_outputs_are_predict_s(
    tmp_path: Path, task: Literal["classification", "multilabel", "regression"], measured: bool
) -> None:
    backbone = tiny_backbones.text_backbone(tmp_path)
    embeddings = backbone.embed([tiny_backbones.sentence(seed) for seed in range(60)]).embeddings
    region = fit_region(embeddings, np.arange(60) % 2, np.arange(60) % 5, 8)
    assert region is not None
    threshold = 0.7 if task == "classification" else 0.0
    more: dict[str, Any] = {"doubt": AbstentionRule(threshold), "region": region, "measured": measured}
    if task == "multilabel":
        more["certain"] = (0.8, 0.9)
    head = head_of(task, smoothing=0.02, value_mean=1e6, value_scale=3.0, **more)
    prepared = [backbone.preprocess(tiny_backbones.sentence(seed, 1 + seed % 9)) for seed in range(100, 200)]
    graph = (backbone.path / GRAPH_FILE).read_bytes()
    found = run(append_head(graph, head, {}, backbone.silence), backbone.feed(prepared))
    wanted = head.predict(backbone.run(prepared))
    np.testing.assert_array_equal(found["abstained"], wanted.abstained)
    np.testing.assert_allclose(found["distance"], wanted.distance, rtol=1e-4)
    assert set(wanted.abstained.tolist()) == ({True, False} if measured else {True})
    if task == "regression":
        assert wanted.values is not None
        np.testing.assert_allclose(found["values"], wanted.values, rtol=1e-9)
    else:
        np.testing.assert_allclose(found["probabilities"], wanted.probabilities, atol=1e-6)
    if task == "classification":
        np.testing.assert_array_equal(found["answer"], wanted.answers)
    if task == "multilabel":
        np.testing.assert_array_equal(found["assigned"], wanted.assigned)
        np.testing.assert_array_equal(found["uncertain"], wanted.uncertain)


@pytest.mark.parametrize("costs", [[], [1.0, 40.0]])
@pytest.mark.parametrize("alarms", [[], [NO_ALARM, 0.02]])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_the_answer_is_predict_s_with_costs_and_alarms(
    tmp_path: Path, costs: list[float], alarms: list[float], threshold: float
) -> None:
    backbone = tiny_backbones.text_backbone(tmp_path)
    arrays = {"costs": np.array(costs, np.float32), "alarms": np.array(alarms, np.float32)}
    head = head_of("classification", smoothing=0.02, doubt=AbstentionRule(threshold), **arrays)
    prepared = [backbone.preprocess(tiny_backbones.sentence(seed, 1 + seed % 9)) for seed in range(100, 300)]
    model = append_head((backbone.path / GRAPH_FILE).read_bytes(), head, {}, None)
    found, wanted = run(model, backbone.feed(prepared)), head.predict(backbone.run(prepared))
    np.testing.assert_allclose(found["probabilities"], wanted.probabilities, atol=1e-6)
    np.testing.assert_array_equal(found["answer"], wanted.answers)
    np.testing.assert_array_equal(found["abstained"], wanted.abstained)
    assert found["answer"].dtype == np.int64
    moved = (found["answer"] != wanted.probabilities.argmax(axis=1)).any()
    assert moved == bool(costs)
    assert set(found["abstained"].tolist()) == ({True, False} if alarms or threshold else {False})
    facts = {item.key: json.loads(item.value) for item in onnx.load_from_string(model).metadata_props}
    assert facts["costs"] == dict(zip("ab", costs, strict=False))
    assert facts["alarms"] == ({"b": pytest.approx(0.02)} if alarms else {})


def test_a_text_that_says_nothing_abstains_whatever_stands_in_front_of_it(tmp_path: Path) -> None:
    backbone = tiny_backbones.text_backbone(tmp_path)
    assert isinstance(backbone.spec.transform, TextTransform)
    graph = (backbone.path / GRAPH_FILE).read_bytes()
    texts = ("unheard", "unheard of words", "ba unheard", "unheard ba", "ba", "ban bal", "?", "dal " * 100)
    for prompt, skipped in (("", 0), ("ba: ", 3), ("ban bal ", 3), ("unheard ", 2)):
        transform = replace(backbone.spec.transform, prompt=prompt)
        preprocessor = TextPreprocessor(transform, backbone.path / TOKENIZER_FILE)
        assert preprocessor.silence == Silence(preprocessor.silence.tokens, skipped)
        tokens = [preprocessor(text) for text in texts]
        model = append_head(graph, head_of("classification"), {}, preprocessor.silence)
        # Together, so that most of them are padded.
        found = run(model, backbone.feed(tokens))["abstained"].tolist()
        assert found == [preprocessor.knows_nothing(*pair) for pair in zip(texts, tokens, strict=True)]
        assert found == [True, True, False, False, False, False, True, False]


def test_what_is_no_backbone_is_refused() -> None:
    with pytest.raises(InvalidGraph, match="Export it again"):
        append_head(b"", head_of("classification"), {})
    with pytest.raises(InvalidGraph, match="truncated"):
        append_head(b"\x3a\x7f", head_of("classification"), {})
