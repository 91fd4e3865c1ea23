"""Finding exports in a real BentoML model store: whole ones, by the names of the settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from models.digests import folder_sha256
from models.sources.source import parse_source
from models.spec import GRAPH_FILE, MANIFEST_FILE, PACKAGED, ImageTransform, UnknownBackbone
from models.store.exports import model_name
from models.store.manifest import read_manifest, write_manifest
from tests.support.models import tiny_backbones


def find(home: Path, *names: str) -> list[str | None]:
    """The result of model_store.find in a new process, because BentoML reads its home once."""
    program = (
        "import json, sys\nfrom models.store.exports import find, find_tag\n"
        "print(json.dumps([find(n) and [str(find(n)), find_tag(n)] for n in sys.argv[1:]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *names],
        check=True,
        capture_output=True,
        cwd=Path(__file__).parents[3],
        env=os.environ | {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "true"},
    )
    answer: list[str | None] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_finds_what_is_whole_and_nothing_else(tmp_path: Path) -> None:
    image, text = tiny_backbones.install(tmp_path)
    found = find(tmp_path, image, text, "minilm-l6-v2", "timm:another")
    assert [entry and Path(entry[0]).parent.name for entry in found] == [
        model_name(image),
        model_name(text),
        None,
        None,
    ]
    assert found[0] is not None
    graph = Path(found[0][0]) / GRAPH_FILE
    graph.write_bytes(graph.read_bytes()[:-1])
    assert find(tmp_path, image) == [None]
    (graph.parent / "model.yaml").unlink()
    assert find(tmp_path, image) == [None]


def test_an_empty_store(tmp_path: Path) -> None:
    assert find(tmp_path, "efficientnet-lite0") == [None]


def test_names_in_the_store() -> None:
    assert model_name("minilm-l6-v2") == "minilm-l6-v2"
    long = "timm:hf_hub/" + "Very_Long.Name" * 20
    for name in ("timm:resnet18", "sentence-transformers:BAAI/bge-small-en-v1.5", long, "timm:x"):
        stored = model_name(name)
        assert len(stored) <= 63
        assert stored.replace("-", "").isalnum()
        assert stored.islower()
    assert model_name("timm:x") != model_name("sentence-transformers:x")
    assert model_name("timm:a/x") != model_name("timm:b/x")
    short = "s" * 48
    for entry in ("my.net_2=timm:resnet18", f"{short}=onnx:/models/net.onnx"):
        assert len(model_name(entry)) <= 63
        assert model_name(entry).startswith(entry.partition("=")[0])
    assert len({model_name(f"{name}timm:{place}") for name in ("", "a=", "b=") for place in "xy"}) == 6
    assert model_name("a=timm:x@/m.pth") != model_name("a=timm:y@/m.pth")
    with pytest.raises(UnknownBackbone):
        model_name("x")


def test_a_folder_is_the_same_however_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    around = f"timm:{tmp_path}/other/../model"
    (tmp_path / "other").mkdir()
    assert parse_source(around).path == (tmp_path / "model").resolve()
    assert model_name(around) == model_name(f"timm:{tmp_path}/model")
    assert parse_source("timm:resnet18").path is None
    assert parse_source("efficientnet-lite0").path is None


def test_only_weights_and_settings_make_a_folder_another(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    before = folder_sha256(tmp_path)
    (tmp_path / "README.md").write_text("changed")
    assert folder_sha256(tmp_path) == before
    (tmp_path / "1_Pooling" / "config.json").write_text('{"a": 1}')
    assert folder_sha256(tmp_path) != before


def test_a_changed_folder_is_not_what_was_exported(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    tiny_backbones.install(tmp_path)
    target = tmp_path / "models" / model_name(f"timm:{folder}")
    shutil.copytree(tmp_path / "models" / model_name(tiny_backbones.IMAGE_NAME), target)
    version = target / (target / "latest").read_text()
    spec = replace(read_manifest(version, verify=True), weights_sha256=folder_sha256(folder))
    write_manifest(version, spec)
    model = version / "model.yaml"
    model.write_text(model.read_text().replace(model_name(tiny_backbones.IMAGE_NAME), target.name))
    assert find(tmp_path, f"timm:{folder}") != [None]
    assert isinstance(spec.transform, ImageTransform)
    write_manifest(version, replace(spec, transform=replace(spec.transform, crop_mode="center")))
    assert find(tmp_path, f"timm:{folder}") == [None], "earlier releases saw the middle of long images only"
    write_manifest(version, spec)
    (folder / "model.safetensors").write_bytes(b"others")
    assert find(tmp_path, f"timm:{folder}") == [None]


def test_a_packaged_backbone_s_old_format_is_exported_again_and_others_go_on(tmp_path: Path) -> None:
    _, text = tiny_backbones.install(tmp_path)
    own = tmp_path / "models" / model_name(text)
    own /= (own / "latest").read_text()
    packaged = tmp_path / "models" / "minilm-l6-v2" / PACKAGED["minilm-l6-v2"].fingerprint[:16]
    shutil.copytree(own, packaged)
    model = packaged / "model.yaml"
    text_in_store = model.read_text().replace(own.parent.name, "minilm-l6-v2")
    model.write_text(text_in_store.replace(own.name, packaged.name))
    assert None not in find(tmp_path, "minilm-l6-v2", text)
    for version in (own, packaged):
        manifest = json.loads((version / MANIFEST_FILE).read_text())
        (version / MANIFEST_FILE).write_text(json.dumps(manifest | {"format": 1}))
    packaged_found, own_found = find(tmp_path, "minilm-l6-v2", text)
    assert packaged_found is None
    assert own_found is not None
