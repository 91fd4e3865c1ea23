"""Heads: bytes and back, predictions, abstention, and what they become in ONNX."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from adapters.heads.answers import NO_ALARM
from adapters.heads.head import CorruptHead, Head
from adapters.heads.onnx import PROBABILITIES, VALUES, append_head
from adapters.prediction.scorer import shape
from adapters.probe.fit import fit
from models.backbone import Backbone
from models.protobuf import InvalidGraph
from models.spec import GRAPH_FILE, IDS, MASK, RGB
from tests.support.models import tiny_backbones
from tests.support.models.synthetic_embeddings import classification, clouds, dataset


@pytest.fixture(scope="module")
def head() -> Head:
    return fit(classification(150, 32, 3)).head


def test_comes_back_from_its_bytes_and_answers_alike(head: Head) -> None:
    again = Head.from_bytes(head.to_bytes())
    rows = clouds(50, 32, 3, seed=9)[0]
    first, second = head.predict(rows), again.predict(rows)
    assert again.labels == head.labels
    assert np.array_equal(first.probabilities, second.probabilities)
    assert np.array_equal(first.abstention_score, second.abstention_score)
    assert again.to_bytes() == head.to_bytes()


def test_costs_and_alarms_come_back_and_heads_without_them_stay_readable_for_older_releases(
    head: Head,
) -> None:
    costs, alarms = np.array([1.0, 9.0, 1.0], np.float32), np.array([0.1, NO_ALARM, NO_ALARM], np.float32)
    assert b'\\"format\\": 2' in head.to_bytes()
    rows = clouds(50, 32, 3, apart=1.0, seed=9)[0]
    for one in (
        replace(head, costs=costs),
        replace(head, alarms=alarms),
        replace(head, costs=costs, alarms=alarms),
    ):
        data = one.to_bytes()
        # An older release must not answer without them.
        assert b'\\"format\\": 3' in data
        again = Head.from_bytes(data)
        assert again.to_bytes() == data
        assert again.nbytes == head.nbytes + one.costs.nbytes + one.alarms.nbytes
        first, second = one.predict(rows), again.predict(rows)
        np.testing.assert_array_equal(first.answers, second.answers)
        np.testing.assert_array_equal(first.abstained, second.abstained)
    with pytest.raises(CorruptHead, match="costs or alarms"):
        Head.from_bytes(replace(head, costs=costs[:2]).to_bytes())


def test_an_alarm_makes_it_abstain_however_confident(head: Head) -> None:
    rows = clouds(200, 32, 3, apart=3.0, seed=9)[0]
    bold = replace(head, doubt=replace(head.doubt, threshold=0.0), region=None)
    assert not bold.predict(rows).abstained.any()
    chances = bold.predict(rows).probabilities[:, 0]
    limit = np.float32(np.median(chances))
    wary = replace(bold, alarms=np.array([limit, NO_ALARM, NO_ALARM], np.float32))
    np.testing.assert_array_equal(wary.predict(rows).abstained, chances >= limit)


def test_refuses_bytes_that_are_no_head(head: Head) -> None:
    data = head.to_bytes()
    for broken in (
        b"",
        b"{}",
        data[:-1],
        data[: len(data) // 2],
        data.replace(b'\\"format\\": 2', b'\\"format\\": 9'),
    ):
        with pytest.raises(CorruptHead):
            Head.from_bytes(broken)


def test_probabilities_add_up_and_a_row_does_not_depend_on_others(head: Head) -> None:
    rows = clouds(64, 32, 3, seed=4)[0]
    together = head.predict(rows)
    assert np.allclose(together.probabilities.sum(axis=1), 1.0, atol=1e-5)
    alone = np.concatenate([head.predict(rows[row : row + 1]).probabilities for row in range(64)])
    assert np.abs(together.probabilities - alone).max() < 1e-5


@pytest.mark.parametrize(("n", "dim", "labels"), [(150, 32, 3), (300, 384, 20), (6, 32, 2)])
def test_one_row_is_answered_as_many_are(n: int, dim: int, labels: int) -> None:
    one = fit(classification(n, dim, labels)).head
    for apart in (0.5, 3.0, 30.0):
        rows = clouds(100, dim, labels, apart=apart, seed=5)[0]
        many = shape(one, one.predict(rows), labels)
        for row, expected in zip(rows, many, strict=True):
            (found,) = shape(one, one.predict(row[None]), labels)
            assert found.label == expected.label
            assert found.abstained == expected.abstained
            assert found.abstention_score == pytest.approx(expected.abstention_score, rel=1e-4, abs=1e-4)
            assert dict(found.probabilities) == pytest.approx(dict(expected.probabilities), abs=1e-5)


def test_abstains_on_inputs_of_another_world(head: Head) -> None:
    familiar = head.predict(clouds(300, 32, 3, apart=3.0, seed=5)[0])
    strange = head.predict(clouds(300, 32, 3, apart=3.0, seed=5, shift=1.5)[0])
    assert familiar.abstained.mean() < 0.2
    assert strange.abstained.mean() > 0.9
    assert np.median(strange.abstention_score) > np.quantile(familiar.abstention_score, 0.99)


def test_what_is_answered_is_right_as_often_as_promised() -> None:
    head = fit(classification(900, 32, 3, apart=1.5)).head
    rows, names = clouds(3_000, 32, 3, apart=1.5, seed=7)
    predictions = head.predict(rows)
    right = np.array(head.labels)[predictions.answers] == np.array(names)
    answered = ~predictions.abstained
    assert answered.any()
    assert right[answered].mean() > right.mean()
    assert right[answered].mean() > 0.92


@pytest.mark.parametrize("dim", [384, 1_280])
def test_a_head_of_twenty_labels_weighs_kilobytes(dim: int) -> None:
    rows, names = clouds(200, dim, 20, apart=4.0)
    assert len(fit(dataset(rows, names)).head.to_bytes()) <= 64 << 10


def test_a_head_counts_the_memory_that_it_takes() -> None:
    """A cache counts by it. In a file, large weights and all means take half as much."""
    rows, names = clouds(200, 1_280, 20, apart=4.0)
    head = Head.from_bytes(fit(dataset(rows, names)).head.to_bytes())
    region = head.region
    assert region is not None
    means = head.scaling.mean.nbytes + region.mean.nbytes
    others = head.bias.nbytes + head.decisions.nbytes + region.directions.nbytes
    small = region.steps.nbytes + region.plain.nbytes + region.centres.nbytes
    assert head.weight.nbytes == 4 * 20 * 1_280
    assert means == 2 * 4 * 1_280
    assert head.nbytes == head.weight.nbytes + means + others + small


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_the_onnx_file_answers_like_the_head(task: str, kind: str, tmp_path: Path) -> None:
    backbone = (
        tiny_backbones.image_backbone(tmp_path) if kind == "image" else tiny_backbones.text_backbone(tmp_path)
    )
    inputs = [
        tiny_backbones.picture(seed) if kind == "image" else tiny_backbones.sentence(seed)
        for seed in range(30)
    ]
    embeddings = backbone.embed(inputs).embeddings
    targets = {
        "classification": ["ab"[row % 2] for row in range(30)],
        "multilabel": [("a",) if row % 3 else ("a", "b") for row in range(30)],
        "regression": [float(row) for row in range(30)],
    }[task]
    head = fit(dataset(embeddings, targets, task)).head  # type: ignore[arg-type]
    data = append_head((backbone.path / GRAPH_FILE).read_bytes(), head, {"adapter": "ä"})
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    facts = {item.key: item.value for item in model.metadata_props}
    assert json.loads(facts["labels"]) == list(head.labels)
    assert facts["adapter"] == "ä"
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    name = VALUES if task == "regression" else PROBABILITIES
    assert session.get_outputs()[0].name == name
    found = np.concatenate([session.run([name], _feed(backbone, one))[0] for one in inputs])
    wanted = head.predict(embeddings)
    expected = wanted.values if task == "regression" else wanted.probabilities
    assert expected is not None
    assert np.abs(found - expected).max() <= 1e-4 * max(1.0, float(np.abs(expected).max()))
    assert json.loads(facts["measured"]) is head.measured
    if task == "classification":
        assert json.loads(facts["threshold"]) == head.threshold


def test_labels_decided_by_the_metadata_of_an_onnx_file_are_those_of_the_head(tmp_path: Path) -> None:
    backbone = tiny_backbones.text_backbone(tmp_path)
    inputs = [tiny_backbones.sentence(seed) for seed in range(120)]
    embeddings = backbone.embed(inputs).embeddings
    # Labels that embeddings tell something of, each more frequent than the next.
    along = embeddings - embeddings.mean(axis=0)
    targets = [
        tuple("abc"[label] for label in range(3) if row[label] > 0.5 * label * row.std()) for row in along
    ]
    head = fit(dataset(embeddings[:80], targets[:80], "multilabel")).head
    data = append_head((backbone.path / GRAPH_FILE).read_bytes(), head, {})
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    labels = json.loads(facts["labels"])
    decisions = np.array(json.loads(facts["decisions"]), dtype=np.float32)
    certain = json.loads(facts["certain"])
    probabilities = np.concatenate([session.run(None, _feed(backbone, one))[0] for one in inputs])
    assigned = probabilities >= decisions
    expected = head.predict(embeddings)
    assert expected.assigned is not None
    assert expected.uncertain is not None
    assert (decisions != 0.5).any()
    clear = (np.abs(expected.probabilities - decisions) > 1e-5).all(axis=1)
    assert clear.mean() > 0.9
    for row in np.flatnonzero(clear):
        given = [label for label, there in zip(labels, assigned[row], strict=True) if there]
        assert given == [
            label for label, there in zip(head.labels, expected.assigned[row], strict=True) if there
        ]
    near = clear & (expected.distance <= 1.0)
    confidence = np.where(assigned, probabilities, 1.0 - probabilities)
    uncertain = confidence < np.where(assigned, certain["given"], certain["not_given"])
    assert (uncertain == expected.uncertain)[near].mean() > 0.99


@pytest.mark.parametrize(("origin", "unit"), [(1.7e9, 1.0), (1e9, 1e-3), (0.0, 1e28), (0.0, 1e-30)])
def test_exported_values_keep_the_differences_of_targets(origin: float, unit: float, tmp_path: Path) -> None:
    """Seconds since 1970, small differences of large amounts, and both ends of what a target may be."""
    backbone = tiny_backbones.text_backbone(tmp_path)
    inputs = [tiny_backbones.sentence(seed) for seed in range(30)]
    embeddings = backbone.embed(inputs).embeddings
    targets = [origin + unit * row for row in range(30)]
    head = fit(dataset(embeddings, targets, "regression")).head
    data = append_head((backbone.path / GRAPH_FILE).read_bytes(), head, {})
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    output = session.get_outputs()[0]
    assert (output.name, output.type) == (VALUES, "tensor(double)")
    found = np.concatenate([session.run([VALUES], _feed(backbone, one))[0] for one in inputs])
    expected = head.predict(embeddings).values
    assert expected is not None
    assert np.abs(found - expected).max() <= 1e-4 * head.value_scale
    assert np.ptp(found) > 0.0


def test_what_is_no_graph_is_refused(head: Head) -> None:
    with pytest.raises(InvalidGraph):
        append_head(b"no protobuf at all", head, {})


def _feed(backbone: Backbone, one: bytes | str) -> dict[str, NDArray[np.generic]]:
    prepared = backbone.preprocess(one)[None]
    return {RGB: prepared} if isinstance(one, bytes) else {IDS: prepared, MASK: np.ones_like(prepared)}
