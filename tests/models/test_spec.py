"""Fingerprints: what changes them, what does not, and that those of the packaged backbones stay."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from models.spec import PACKAGED, BackboneSpec, ImageTransform, TextTransform

IMAGE, TEXT = PACKAGED["efficientnet-lite0"], PACKAGED["minilm-l6-v2"]


def test_the_packaged_fingerprints_stay() -> None:
    """Stored embeddings are bound to them: a change here orphans every adapter there is."""
    assert {name: spec.fingerprint[:16] for name, spec in PACKAGED.items()} == {
        "efficientnet-lite0": "4935036fb3c8cf22",
        "efficientnet-lite0-int8": "f41117bd9435f5ad",
        "efficientnet-lite1": "150c9b8269df47f4",
        "efficientnet-lite2": "5b7f0707e47a087a",
        "minilm-l6-v2": "e007e24fc7748b69",
        "minilm-l6-v2-int8": "4ba6bae0d25d40ef",
        "all-mpnet-base-v2": "fb4baa65fa46cd51",
        "multilingual-e5-small": "40c3e378e433473d",
        "use-multilingual-v3": "310da4412cce0073",
    }


@pytest.mark.parametrize("change", [{"name": "other"}, {"licence": "MIT"}, {"source": "timm:/elsewhere"}])
def test_what_does_not_change_an_embedding_does_not_change_the_fingerprint(change: dict[str, str]) -> None:
    assert replace(IMAGE, **change).fingerprint == IMAGE.fingerprint  # type: ignore[arg-type]


def test_what_changes_an_embedding_changes_the_fingerprint() -> None:
    assert isinstance(IMAGE.transform, ImageTransform)
    assert isinstance(TEXT.transform, TextTransform)
    specs = [
        IMAGE,
        replace(IMAGE, weights_sha256="0" * 64),
        replace(IMAGE, architecture="resnet18"),
        replace(IMAGE, dim=3),
        replace(IMAGE, pooling="max"),
        replace(IMAGE, precision="float16"),
        replace(IMAGE, transform=replace(IMAGE.transform, size=192)),
        replace(IMAGE, transform=replace(IMAGE.transform, interpolation="bilinear")),
        TEXT,
        replace(TEXT, transform=replace(TEXT.transform, max_tokens=128)),
        replace(TEXT, transform=replace(TEXT.transform, prompt="query: ")),
    ]
    assert len({spec.fingerprint for spec in specs}) == len(specs)


@pytest.mark.parametrize("spec", [IMAGE, TEXT], ids=["image", "text"])
def test_a_spec_survives_json(spec: BackboneSpec) -> None:
    assert BackboneSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_spec_that_was_edited_is_refused() -> None:
    with pytest.raises(ValueError, match="changed after"):
        BackboneSpec.from_json(IMAGE.to_json() | {"dim": 3})
    with pytest.raises(ValueError, match="not a backbone spec"):
        BackboneSpec.from_json({"fingerprint": "x"})
