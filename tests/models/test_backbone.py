"""Loading export folders and running them: whole folders only, rows in order, the device asked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from models.backbone import Backbone
from models.preprocess.limits import InputError
from models.runtime.session import DeviceUnavailable, open_session
from models.spec import GRAPH_FILE, INT8, MANIFEST_FILE, TOKENIZER_FILE
from models.store.manifest import CorruptExport, read_manifest, write_manifest
from models.survey import planned
from tests.support.models import tiny_backbones


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbones.image_backbone(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbones.text_backbone(tmp_path_factory.mktemp("texts"))


def test_what_it_says_of_itself(images: Backbone, texts: Backbone) -> None:
    assert (images.spec.dim, images.device, images.precision) == (tiny_backbones.IMAGE_DIM, "cpu", "float32")
    assert (images.preprocess_stage, texts.preprocess_stage) == ("decode", "tokenize")


def test_rows_keep_their_order_whatever_the_lengths(texts: Backbone) -> None:
    sentences = [tiny_backbones.sentence(seed, words=(seed * 37) % 90 + 1) for seed in range(150)]
    together = texts.run([texts.preprocess(sentence) for sentence in sentences])
    for row, sentence in zip(together, sentences, strict=True):
        np.testing.assert_allclose(row, texts.run([texts.preprocess(sentence)])[0], atol=1e-5)


def test_images_together_equal_images_alone(images: Backbone) -> None:
    prepared = [images.preprocess(tiny_backbones.picture(seed)) for seed in range(20)]
    np.testing.assert_array_equal(
        images.run(prepared), np.concatenate([images.run([one]) for one in prepared])
    )


def test_nothing_to_run(images: Backbone, texts: Backbone) -> None:
    assert images.run([]).shape == (0, tiny_backbones.IMAGE_DIM)
    assert texts.embed([]).embeddings.shape == (0, tiny_backbones.TEXT_DIM)


def test_embed_reports_errors_in_their_places(texts: Backbone) -> None:
    answer = texts.embed([tiny_backbones.sentence(1), "", tiny_backbones.sentence(2)])
    assert list(answer.errors) == [1]
    assert not answer.embeddings[1].any()
    np.testing.assert_allclose(np.linalg.norm(answer.embeddings[[0, 2]], axis=1), 1, atol=1e-5)
    assert set(answer.timings) == {"tokenize", "queue", "embed"}


def test_the_other_kind_of_input_is_refused(images: Backbone, texts: Backbone) -> None:
    for backbone, item in ((images, "text"), (texts, b"bytes")):
        with pytest.raises(InputError) as caught:
            backbone.preprocess(item)
        assert caught.value.code == "wrong_kind"


def test_many_threads_share_a_backbone(texts: Backbone) -> None:
    sentences = [tiny_backbones.sentence(seed, words=seed % 40 + 1) for seed in range(200)]
    expected = texts.embed(sentences).embeddings
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda sentence: texts.embed([sentence]).embeddings[0], sentences))
    np.testing.assert_allclose(np.stack(answers), expected, atol=1e-5)


def test_a_table_beside_the_graph_is_the_one_that_is_looked_up_in(tmp_path: Path) -> None:
    folder = tiny_backbones.text_export(tmp_path)
    spec = read_manifest(folder, verify=True)
    expected = Backbone.open(folder).embed(["badel dan"]).embeddings
    (table,) = [one for one in onnx.load(folder / GRAPH_FILE).graph.initializer if one.name == "table"]
    for factor in (1.0, -1.0):
        np.save(folder / "table0.npy", np.float32(factor) * onnx.numpy_helper.to_array(table))
        write_manifest(folder, spec, {"table": "table0.npy"})
        backbone = Backbone.open(folder, threads=2)
        for beside in (True, False):
            found = backbone.run([backbone.preprocess("badel dan")], beside=beside)
            assert np.allclose(found, expected, atol=1e-6) == (factor == 1.0)
    (folder / "table0.npy").write_bytes((folder / "table0.npy").read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptExport):
        Backbone.open(folder)


def test_eight_bits_are_for_cpus(tmp_path: Path) -> None:
    folder = tiny_backbones.image_export(tmp_path)
    write_manifest(folder, replace(read_manifest(folder, verify=True), precision=INT8))
    assert Backbone.open(folder).precision == INT8
    for refuse in (Backbone.open, partial(planned, threads=1)):
        with pytest.raises(DeviceUnavailable, match="is for CPUs"):
            refuse(folder, device="cuda")


@pytest.mark.parametrize("make", [tiny_backbones.image_export, tiny_backbones.text_export])
def test_runs_beside_others_give_the_same(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    backbone = Backbone.open(make(tmp_path), threads=2)
    inputs: list[bytes | str] = [tiny_backbones.picture(3), tiny_backbones.picture(4)]
    if backbone.spec.kind == "text":
        inputs = ["badel", "dan fol kin"]
    prepared = [backbone.preprocess(item) for item in inputs]
    np.testing.assert_allclose(backbone.run(prepared, beside=True), backbone.run(prepared), atol=1e-5)
    backbone.close()
    with pytest.raises(RuntimeError, match="closed"):
        backbone.run(prepared, beside=True)


def test_a_closed_backbone_says_so(tmp_path: Path) -> None:
    backbone = tiny_backbones.image_backbone(tmp_path)
    prepared = backbone.preprocess(tiny_backbones.picture(1))
    backbone.close()
    with pytest.raises(RuntimeError, match="closed"):
        backbone.run([prepared])


@pytest.mark.parametrize("name", [GRAPH_FILE, TOKENIZER_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("damage", ["missing", "half", "changed"])
def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    folder = tiny_backbones.text_export(tmp_path)
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "half":
        path.write_bytes(content[: len(content) // 2])
    else:
        place = content.index(b'"dim": ') + 7 if name == MANIFEST_FILE else len(content) // 2
        content[place] ^= 1
        path.write_bytes(content)
    with pytest.raises(CorruptExport, match="Export the backbone again"):
        Backbone.open(folder)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU here")
def test_asking_for_a_gpu_that_is_not_there_fails(tmp_path: Path) -> None:
    with pytest.raises(DeviceUnavailable, match="nvidia-smi"):
        Backbone.open(tiny_backbones.image_export(tmp_path), device="cuda")


def test_a_cpu_session_runs_on_the_cpu(tmp_path: Path) -> None:
    session = open_session(tiny_backbones.image_export(tmp_path) / GRAPH_FILE, device="cpu", threads=1)
    assert session.get_providers() == ["CPUExecutionProvider"]
    options = session.get_session_options()
    assert not options.enable_cpu_mem_arena
    assert not options.enable_mem_pattern
    assert isinstance(session, onnxruntime.InferenceSession)


def test_images_have_their_memory_laid_out_once_and_texts_do_not(tmp_path: Path) -> None:
    for backbone, once in (
        (tiny_backbones.image_backbone(tmp_path / "images"), True),
        (tiny_backbones.text_backbone(tmp_path / "texts"), False),
    ):
        options = backbone._session.get_session_options()
        assert (options.enable_cpu_mem_arena, options.enable_mem_pattern) == (once, once)


def test_serving_imports_neither_torch_nor_what_only_export_needs() -> None:
    program = (
        "import sys, models.batching.batcher, models.backbone, models.store.exports\n"
        "heavy = {'torch', 'onnx', 'timm', 'sentence_transformers', 'transformers', 'bentoml'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
