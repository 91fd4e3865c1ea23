"""Exports of a version: files that answer elsewhere as the service answers here."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from tokenizers import Tokenizer

from adapters.heads.head import Head
from tests.support.service.client import BLAME, PRAISE, UNSEEN, Caller, image, pictures, reviews


def probabilities(
    caller: Caller, adapter: str, inputs: list[dict[str, str]], labels: list[str]
) -> np.ndarray:
    """The service's probabilities, float (n, labels)."""
    found = caller.predict(adapter, inputs, top_k=1000)["predictions"]
    rows = [{part["label"]: part["probability"] for part in one["probabilities"]} for one in found]
    return np.array([[row[label] for label in labels] for row in rows])


def session(caller: Caller, path: str) -> tuple[onnxruntime.InferenceSession, dict[str, str]]:
    """The exported network, opened by ONNX Runtime alone, with its metadata."""
    response = caller.http.get(path)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-disposition"].endswith('.onnx"')
    onnx.checker.check_model(onnx.load_from_string(response.content))
    opened = onnxruntime.InferenceSession(response.content, providers=["CPUExecutionProvider"])
    return opened, dict(opened.get_modelmeta().custom_metadata_map)


def test_texts_get_the_same_probabilities_elsewhere(caller: Caller) -> None:
    caller.adapt("films", reviews())
    opened, metadata = session(caller, "/adapters/films/versions/1/export?format=onnx")
    labels = json.loads(metadata["labels"])
    assert sorted(labels) == ["bad", "good"]
    assert (metadata["task"], metadata["kind"], metadata["version"]) == ("classification", "text", "1")
    assert metadata["format"] == "4"
    texts = [*PRAISE, *BLAME, "Something else entirely", "longer than what is read of it " * 80]
    # As it comes, it pads a batch, and truncates.
    encoded = Tokenizer.from_str(metadata["tokenizer"]).encode_batch(texts)
    ids, mask = np.array([one.ids for one in encoded]), np.array([one.attention_mask for one in encoded])
    assert ids.shape == (len(texts), json.loads(metadata["preprocessing"])["max_tokens"])
    theirs, answers = opened.run(["probabilities", "answer"], {"ids": ids, "mask": mask})
    items = [{"text": text} for text in texts]
    said = caller.predict("films", items)["predictions"]
    assert [labels[place] for place in answers] == [one["label"] for one in said]
    ours = probabilities(caller, "films", items, labels)
    assert np.abs(theirs - ours).max() <= 1e-4


def test_images_get_the_same_probabilities_elsewhere(caller: Caller) -> None:
    from models.preprocess.image import ImagePreprocessor
    from models.spec import PACKAGED, ImageTransform

    caller.adapt("things", pictures())
    opened, metadata = session(caller, "/adapters/things/versions/1/export")
    labels = json.loads(metadata["labels"])
    assert json.loads(metadata["preprocessing"])["size"] == 224
    transform = PACKAGED["efficientnet-lite0"].transform
    assert isinstance(transform, ImageTransform)
    seen = np.stack([ImagePreprocessor(transform)(data) for data in UNSEEN.values()])
    theirs = opened.run(["probabilities"], {"rgb": seen})[0]
    ours = probabilities(caller, "things", [image(data) for data in UNSEEN.values()], labels)
    assert np.abs(theirs - ours).max() <= 1e-4


def test_a_regression_is_exported_with_its_values(caller: Caller) -> None:
    examples = [{"text": "very " * number + "good", "target": float(number)} for number in range(1, 9)]
    caller.adapt("length", examples, task="regression")
    opened, metadata = session(caller, "/adapters/length/versions/1/export")
    tokenizer = Tokenizer.from_str(metadata["tokenizer"])
    tokenizer.no_padding()
    ids = np.array([tokenizer.encode("very very good").ids], np.int64)
    (theirs,) = opened.run(["values"], {"ids": ids, "mask": np.ones_like(ids)})[0]
    (ours,) = caller.predict("length", [{"text": "very very good"}])["predictions"]
    assert theirs == pytest.approx(ours["value"], abs=1e-4)


def test_the_head_alone_is_the_stored_artifact(caller: Caller) -> None:
    caller.adapt("films", reviews())
    response = caller.http.get("/adapters/films/versions/1/export?format=safetensors")
    head = Head.from_bytes(response.content)
    assert sorted(head.labels) == ["bad", "good"]
    assert len(response.content) == caller.call("GET", "/adapters/films/versions/1")["bytes"]


def test_other_formats_are_refused(caller: Caller) -> None:
    caller.adapt("films", reviews(1))
    assert caller.code("GET", "/adapters/films/versions/1/export?format=pickle", 422) == "invalid_request"
