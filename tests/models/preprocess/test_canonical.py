"""The packaged backbones, as exported and served, against timm's and sentence-transformers' embeddings."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from models.backbone import Backbone
from models.spec import FLOAT32, HALF_FILE, TOKENIZER_FILE
from models.store.exports import find
from models.store.manifest import read_tables
from tests.models.preprocess import canonical

ROOT = Path(__file__).parents[3]

# Least cosine between a backbone and torch. The quality benchmark shows what 8 bits cost.
LEAST_COSINE = {
    "efficientnet-lite0": canonical.MIN_COSINE,
    "minilm-l6-v2": canonical.MIN_COSINE,
    "efficientnet-lite0-int8": 0.94,
    "minilm-l6-v2-int8": 0.95,
    "multilingual-e5-small": canonical.MIN_COSINE,
    "use-multilingual-v3": canonical.MIN_COSINE,
}


@pytest.fixture(scope="module", params=list(LEAST_COSINE))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """Exported where it is not yet, which takes a minute once."""
    name: str = request.param
    if find(name) is None:
        subprocess.run([sys.executable, "-m", "models.export", name], check=True, cwd=ROOT)
    folder = find(name)
    assert folder is not None
    return Backbone.open(folder, threads=2)


def test_embeddings_are_the_reference_s(backbone: Backbone) -> None:
    inputs = canonical.pictures() if backbone.spec.kind == "image" else list(canonical.TEXTS)
    answer = backbone.embed(inputs)
    assert answer.errors == {}
    name = backbone.spec.name
    with np.load(canonical.FILE, allow_pickle=False) as stored:
        reference = stored[name.removesuffix("-int8")]
    assert canonical.cosines(answer.embeddings, reference).min() >= LEAST_COSINE[name]


def test_large_tables_lie_beside_the_graph(backbone: Backbone) -> None:
    shapes = [np.load(path, mmap_mode="r").shape for path in read_tables(backbone.path).values()]
    # Two weights of 4 bits are one byte.
    many = {"multilingual-e5-small": (250_037, 192), "use-multilingual-v3": (128_010, 512)}
    assert shapes == ([many.get(backbone.spec.name, (30_522, 384))] if backbone.spec.kind == "text" else [])


def test_single_precision_has_a_form_in_half_precision(backbone: Backbone) -> None:
    assert (backbone.path / HALF_FILE).exists() == (backbone.spec.precision == FLOAT32)


def test_together_equals_alone(backbone: Backbone) -> None:
    inputs = canonical.pictures() if backbone.spec.kind == "image" else list(canonical.TEXTS)
    together = backbone.embed(inputs).embeddings
    alone = np.concatenate([backbone.embed([one]).embeddings for one in inputs])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_the_stored_references_are_torch_s() -> None:
    """Computes them again; in a process of its own, for torch stays in the process that imports it."""
    subprocess.run(
        [sys.executable, "-m", "tests.models.preprocess.canonical"],
        check=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


# Thousands of these characters make few tokens, none, or more tokens than characters.
_ODD = (
    *("a" * 5_000, "한" * 3_000, "\U0001d160" * 2_500, "\ufdfa" * 3_000, "\u0301" * 4_500, " " * 5_000),
    *(
        "a" + "\u0301\u0302\u0323" * 30,
        "ﬃ" * 300,
        "\u200b" * 4_200,
        "=" * 300,
        "中" * 900,
        "é" * 120,
        "e\u0301" * 90,
    ),
    *(
        "x" * 99,
        "x" * 100,
        "x" * 101,
        "[SEP]",
        "\u1100\u1161\u11a8" * 60,
        "👩‍👩‍👧" * 40,
        "word",
        "don't",
        "\t\n",
        "ǅ" * 101,
    ),
)


@pytest.mark.parametrize("backbone", ["minilm-l6-v2"], indirect=True)
def test_of_any_long_text_the_tokens_are_those_of_the_whole(backbone: Backbone) -> None:
    """However few tokens its start has, and where words, marks and letters are cut."""
    whole = Tokenizer.from_file(str(backbone.path / TOKENIZER_FILE))
    whole.no_padding()
    whole.enable_truncation(256)
    rng = np.random.default_rng(5)
    texts = [odd * (90_000 // len(odd)) for odd in _ODD]
    texts += ["".join(rng.choice(_ODD, 40))[:count] for count in rng.integers(4_000, 90_000, 60)]
    texts += [" ".join(rng.choice(_ODD[6:], 4_000))[:count] for count in rng.integers(4_000, 20_000, 40)]
    texts += ["a" * count + "中" * 300 for count in (4_095, 4_096, 16_383, 16_384, 65_537)]
    cut = 0
    for text in texts:
        if not text.isspace():
            expected = whole.encode(text)
            ready = backbone.prepare(text)
            np.testing.assert_array_equal(ready.prepared, expected.ids)
            assert ready.truncated is bool(expected.overflowing)
            cut += ready.truncated
    assert 50 < cut < len(texts)


@pytest.mark.parametrize("backbone", ["minilm-l6-v2"], indirect=True)
def test_a_long_word_before_a_long_text_is_not_the_price_of_all_of_it(backbone: Backbone) -> None:
    whole = Tokenizer.from_file(str(backbone.path / TOKENIZER_FILE))
    text = "a" * 5_000 + "中" * 94_990

    def seconds(work: Callable[[str], object]) -> float:
        begin = time.thread_time()
        work(text)
        return time.thread_time() - begin

    assert min(seconds(backbone.prepare) for _ in range(3)) < 0.4 * min(
        seconds(whole.encode) for _ in range(3)
    )
