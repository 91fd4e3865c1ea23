"""Image networks of timm: folders, and checkpoints of its architectures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.arrays import Floats
from models.digests import file_sha256, folder_sha256
from models.export.network import Network
from models.export.networks.hub import weights_folder
from models.sources.content import UNKNOWN_LICENCE, card_licence
from models.sources.source import ExportRefused, Source
from models.spec import FLOAT32, BackboneSpec, ImageTransform

# Where programs for training put the weights in a checkpoint; the averaged ones are those that they evaluate.
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
# What wrappers put in front of the names of tensors.
_PREFIXES = ("module.", "_orig_mod.", "model.", "state_dict.", "backbone.", "encoder.")
_NAMED = 3  # tensors that a message names


def load_timm(source: Source) -> Network:
    """Load a network of timm from a folder, its hub or a checkpoint. Raises ExportRefused."""
    return _load_checkpoint(source) if source.architecture else _load_folder(source)


def timm_network(spec: BackboneSpec, network: Any) -> Network:
    """Wrap a timm network that returns the pooled penultimate features, as with num_classes=0.

    They are not normalised: the features are non-negative, and their length tells how much was seen. The
    linear probe's own scaling uses that, and cosine would discard it.
    """
    import torch

    assert isinstance(spec.transform, ImageTransform)
    evaluation = evaluation_transform(spec.transform)

    def reference(images: Sequence[bytes]) -> Floats:
        pixels = torch.stack([evaluation(Image.open(io.BytesIO(image)).convert("RGB")) for image in images])
        with torch.inference_mode():
            return np.asarray(network(pixels), np.float32)

    return Network(spec, network, reference)


def evaluation_transform(transform: ImageTransform) -> Any:
    """timm's own preprocessing, from an image of Pillow to a tensor of pixels (3, size, size)."""
    import timm

    return timm.data.create_transform(
        input_size=(3, transform.size, transform.size),
        is_training=False,
        interpolation=transform.interpolation,
        mean=transform.mean,
        std=transform.std,
        crop_pct=transform.crop,
        crop_mode="center" if transform.crop_mode == "fold" else transform.crop_mode,
    )


def _load_folder(source: Source) -> Network:
    import timm

    folder = weights_folder(source)
    if not (folder / "config.json").is_file():
        raise ExportRefused(f"{folder} has no config.json. timm's `save_for_hf` writes such a folder.")
    if '"architecture"' not in (folder / "config.json").read_text(encoding="utf-8", errors="replace"):
        raise ExportRefused(f"{folder} is not a folder of timm: its config.json names no architecture.")
    try:
        network = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise ExportRefused(f"{folder} is not a folder of timm: {_first_line(error)}") from error
    licence = card_licence(folder)
    if licence == UNKNOWN_LICENCE:
        licence = str(network.pretrained_cfg.get("license") or UNKNOWN_LICENCE)
    return timm_network(_spec(source, network, licence, folder_sha256(folder)), network)


def _load_checkpoint(source: Source) -> Network:
    import timm

    file = source.existing()
    assert file is not None
    if not file.is_file():
        raise ExportRefused(f"{file} is a folder. Name a file in it, or use timm:{file}.")
    if not timm.is_model(source.architecture):
        raise ExportRefused(
            f"timm knows no architecture {source.architecture!r}; `timm.list_models()` lists them."
        )
    network = timm.create_model(source.architecture, pretrained=False, num_classes=0)
    _fill(network, _without_prefixes(_tensors(file), network), file, source.architecture)
    spec = _spec(source, network.eval(), card_licence(file.parent), file_sha256(file))
    return timm_network(spec, network)


def _spec(source: Source, network: Any, licence: str, weights_sha256: str) -> BackboneSpec:
    import timm
    import torch

    data = timm.data.resolve_model_data_config(network)
    channels, height, width = data["input_size"]
    if channels != 3 or height != width:
        raise ExportRefused(
            f"{source.text} takes {channels} × {height} × {width}; only square RGB images are supported"
        )
    with torch.inference_mode():
        dim = network(torch.zeros(1, 3, height, width)).shape[1]
    return BackboneSpec(
        name=source.name,
        kind="image",
        source=source.text,
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
        licence=licence,
        precision=FLOAT32,
        weights_sha256=weights_sha256,
    )


def _tensors(file: Path) -> dict[str, Any]:
    """The tensors of a checkpoint by name, without what is around them."""
    import torch
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            found: Any = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # each part of torch that reads files has errors of its own
        if "Weights only load failed" in str(error):
            raise ExportRefused(
                f"{file} holds something else than tensors, which could run code. Save `model.state_dict()`."
            ) from error
        raise ExportRefused(f"{file} is not a checkpoint: {_first_line(error)}") from error
    while isinstance(found, Mapping):
        inner = next((name for name in _CONTAINERS if isinstance(found.get(name), Mapping)), None)
        if inner is None:
            break
        found = found[inner]
    tensors = (
        {str(k): v for k, v in found.items() if torch.is_tensor(v)} if isinstance(found, Mapping) else {}
    )
    if not tensors:
        raise ExportRefused(f"{file} holds no tensors by name. Save `model.state_dict()`.")
    return tensors


def _without_prefixes(tensors: dict[str, Any], network: Any) -> dict[str, Any]:
    """The tensors without what a wrapper put in front of all names, unless the network has such names."""
    own = network.state_dict()
    while not own.keys() & tensors.keys():
        prefix = next((one for one in _PREFIXES if any(name.startswith(one) for name in tensors)), None)
        if prefix is None:
            break
        tensors = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
    return tensors


def _fill(network: Any, tensors: dict[str, Any], file: Path, architecture: str) -> None:
    """Load all weights of the network but a classifier's. Raises ExportRefused, which names what differs."""
    own = network.state_dict()
    classifier = network.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{one}." for one in ([classifier] if isinstance(classifier, str) else classifier))
    tensors = {name: v for name, v in tensors.items() if name in own or not name.startswith(heads)}
    # Counters of batches are not in every checkpoint, and decide on nothing.
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    unknown = [name for name in tensors if name not in own]
    wrong = [
        f"{name} is {tuple(tensors[name].shape)} and should be {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    for what, names in (("lacks", missing), ("has also", unknown), ("has other shapes:", wrong)):
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            raise ExportRefused(
                f"{file} does not fit timm's {architecture}: it {what} {', '.join(names[:_NAMED])}{more}."
            )
    network.load_state_dict(tensors, strict=False)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
