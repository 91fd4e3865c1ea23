"""Digests of what a source holds, wherever it lies, and licences of model cards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from models.sources.content import card_licence, content_sha256
from models.sources.onnx_files import OnnxFiles
from models.sources.source import ExportRefused, parse_source
from tests.support.models.onnx_graphs import text_folder, text_graph


def digest(entry: str) -> str | None:
    return content_sha256(parse_source(entry))


def test_what_is_not_on_this_machine_has_no_digest(tmp_path: Path) -> None:
    assert digest("minilm-l6-v2") is None
    assert digest("timm:resnet18") is None
    assert digest(f"timm:{tmp_path}/none") is None


def test_a_folder_that_moves_keeps_its_digest(tmp_path: Path) -> None:
    text_folder(tmp_path / "a", {"config.json": {}}, external="weights.bin")
    before = digest(f"onnx:{tmp_path}/a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert digest(f"mine=onnx:{tmp_path}/b/model.onnx") == before


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin", "tokenizer.json", "config.json"])
def test_each_file_that_decides_on_embeddings_changes_the_digest(tmp_path: Path, name: str) -> None:
    folder = text_folder(tmp_path / "a", {"config.json": {"a": 1}}, external="weights.bin")
    (folder / "README.md").write_text("# changed")
    before = digest(f"onnx:{folder}")
    (folder / "README.md").write_text("# changed again")
    assert digest(f"onnx:{folder}") == before
    if name == "model.onnx":
        text_graph(folder / name, external="weights.bin", outputs=("sentence_embedding",))
    else:
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    assert digest(f"onnx:{folder}") != before


def test_a_checkpoint_is_known_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"one")
    (tmp_path / "b.pth").write_bytes(b"one")
    before = digest(f"timm:resnet18@{tmp_path}/a.pth")
    assert before == digest(f"timm:resnet18@{tmp_path}/b.pth")
    (tmp_path / "b.pth").write_bytes(b"two")
    assert before != digest(f"timm:resnet18@{tmp_path}/b.pth")


def test_an_inner_folder_s_own_files_win(tmp_path: Path) -> None:
    text_folder(tmp_path, {"config.json": {}})
    inner = tmp_path / "onnx"
    shutil.move(text_folder(inner).joinpath("model.onnx"), inner / "net.onnx")
    files = OnnxFiles.at(inner / "net.onnx")
    assert files.find("tokenizer.json") == inner / "tokenizer.json"
    assert files.find("config.json") == tmp_path / "config.json"
    (inner / "tokenizer.json").unlink()
    assert files.find("tokenizer.json") == tmp_path / "tokenizer.json"


def test_only_a_folder_of_that_name_looks_above(tmp_path: Path) -> None:
    text_folder(tmp_path)
    files = OnnxFiles.at(text_graph(tmp_path / "other" / "net.onnx"))
    assert files.find("tokenizer.json") is None


def test_a_repository_with_an_inner_graph_is_found(tmp_path: Path) -> None:
    graph = text_graph(tmp_path / "onnx" / "model.onnx")
    assert OnnxFiles.at(tmp_path).graph == graph


def test_missing_onnx_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExportRefused, match=r"has no model\.onnx\.$"):
        OnnxFiles.at(tmp_path)
    graph = text_graph(tmp_path / "net.onnx", external="net.onnx_data")
    with pytest.raises(ExportRefused, match=r"It has net\.onnx: name the file"):
        OnnxFiles.at(tmp_path)
    assert OnnxFiles.at(graph).data() == [tmp_path / "net.onnx_data"]
    (tmp_path / "net.onnx_data").unlink()
    with pytest.raises(ExportRefused, match=r"net\.onnx_data, which is missing"):
        OnnxFiles.at(graph).sha256()
    graph.write_bytes(b"\x0a\xff no protobuf")
    with pytest.raises(ExportRefused, match="is not an ONNX model"):
        OnnxFiles.at(graph).data()
    (tmp_path / "net.txt").write_text("")
    with pytest.raises(ExportRefused, match=r"should end in \.onnx"):
        OnnxFiles.at(tmp_path / "net.txt")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# A model", "mit"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\nlicense: other\nlicense_name: our-terms\n---\n", "our-terms"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\ntags: [a]\n---\n", "unknown"),
        ("---\nlicense: [\n---\n", "unknown"),
        ("---\n- a\n---\n", "unknown"),
        ("# license: mit", "unknown"),
        ("", "unknown"),
    ],
)
def test_licences_are_read_from_model_cards(tmp_path: Path, card: str, licence: str) -> None:
    (tmp_path / "README.md").write_text(card)
    assert card_licence(tmp_path / "none", tmp_path) == licence


def test_without_a_card_the_licence_is_unknown(tmp_path: Path) -> None:
    assert card_licence(tmp_path) == "unknown"
