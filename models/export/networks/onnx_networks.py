"""Networks that come as ONNX graphs: inputs and outputs are renamed, and a missing pooling is added."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from models.arrays import Floats
from models.export.network import Network
from models.export.networks.descriptions import TextDescription, read_image_transform, read_text_description
from models.export.networks.graph_parts import completed_images, completed_texts
from models.export.networks.image_networks import evaluation_transform
from models.runtime.session import open_session
from models.sources.content import card_licence
from models.sources.onnx_files import OnnxFiles
from models.sources.source import ExportRefused, Source
from models.spec import FLOAT32, BackboneSpec, ImageTransform

_IDS, _MASK, _TYPES = "input_ids", "attention_mask", "token_type_ids"
# Outputs by name, the preferred one first. Otherwise a graph must have a single output.
_TEXT_OUTPUTS = ("sentence_embedding", "last_hidden_state", "token_embeddings")
_IMAGE_OUTPUTS = ("image_embeds", "pooler_output", "sentence_embedding")
_LARGEST = 2**31 - 1  # bytes of a protobuf message


def load_onnx(source: Source) -> Network:
    """Load an ONNX graph with its descriptions. Raises ExportRefused."""
    import onnx

    path = source.existing()
    assert path is not None
    files = OnnxFiles.at(path)
    size = sum(one.stat().st_size for one in (files.graph, *files.data()))
    if size > _LARGEST:
        raise ExportRefused(f"{files.graph} has {size >> 20} MiB of weights; at most 2 GiB are supported.")
    try:
        model = onnx.load(files.graph)
    except Exception as error:  # protobuf and onnx each have errors of their own
        raise ExportRefused(f"{files.graph} cannot be read: {error}") from error
    constants = {one.name for one in model.graph.initializer}
    inputs = {one.name: one.type.tensor_type for one in model.graph.input if one.name not in constants}
    return (
        _load_texts(source, files, model, inputs)
        if _IDS in inputs
        else _load_images(source, files, model, inputs)
    )


def _load_texts(source: Source, files: OnnxFiles, model: Any, inputs: dict[str, Any]) -> Network:
    odd = [name for name in inputs if name not in (_IDS, _MASK, _TYPES)]
    if odd or _MASK not in inputs:
        raise ExportRefused(
            f"{files.graph} has the inputs {', '.join(inputs)}. A network for texts takes {_IDS} and "
            f"{_MASK}, and may take {_TYPES}."
        )
    for name, kind in inputs.items():
        _check_dynamic(files, name, kind, 2)
    description = read_text_description(files)
    output = _output(files, model, _TEXT_OUTPUTS)
    rank = _rank(output)
    if rank not in (2, 3):
        raise ExportRefused(_of_shape(files, output, "(batch, dim) or (batch, tokens, dim)"))
    is_pooled = rank == 2
    graph = completed_texts(
        model, tuple(inputs), output.name, None if is_pooled else description.pooling, description.normalised
    )
    reference = _text_reference(
        files, list(inputs.values()), tuple(inputs), output.name, description, is_pooled
    )
    pooling = (
        f"{'in the graph' if is_pooled else description.pooling}{', normalised' * description.normalised}"
    )
    spec = BackboneSpec(
        name=source.name,
        kind="text",
        source=source.text,
        architecture=_architecture(files),
        dim=reference(["a"]).shape[1],
        transform=description.transform,
        pooling=pooling,
        licence=card_licence(*files.folders),
        precision=FLOAT32,
        weights_sha256=files.sha256(),
    )
    return Network(spec, None, reference, description.tokenizer, graph=graph)


def _text_reference(
    files: OnnxFiles,
    kinds: Sequence[Any],
    names: Sequence[str],
    output: str,
    description: TextDescription,
    is_pooled: bool,
) -> Callable[[Sequence[str]], Floats]:
    """Embed with the original graph, one text at a time and without padding, and pool with numpy."""
    from tokenizers import Tokenizer

    run = _runner(files, output)
    tokenizer = Tokenizer.from_buffer(description.tokenizer)
    tokenizer.no_padding()
    tokenizer.enable_truncation(description.transform.max_tokens)
    types = [_dtype(kind) for kind in kinds]

    def embed(text: str) -> Any:
        ids = tokenizer.encode(description.transform.prompt + text).ids
        values = {_IDS: ids, _MASK: [1] * len(ids), _TYPES: [0] * len(ids)}
        feed = {name: np.array([values[name]], kind) for name, kind in zip(names, types, strict=True)}
        found = run(feed)[0].astype(np.float32)
        if not is_pooled:
            found = found[0] if description.pooling == "cls" else found.mean(axis=0)
        return found / max(float(np.linalg.norm(found)), 1e-12) if description.normalised else found

    return lambda texts: np.stack([embed(text) for text in texts])


def _load_images(source: Source, files: OnnxFiles, model: Any, inputs: dict[str, Any]) -> Network:
    if len(inputs) != 1:
        raise ExportRefused(
            f"{files.graph} has the inputs {', '.join(inputs) or 'none'}. A network for images has one, and "
            f"one for texts has {_IDS} and {_MASK}."
        )
    ((name, kind),) = inputs.items()
    _check_dynamic(files, name, kind, 4)
    transform = read_image_transform(files)
    sizes = [one.dim_value for one in kind.shape.dim][1:]
    wanted = (3, transform.size, transform.size)
    if any(size and size != one for size, one in zip(sizes, wanted, strict=True)):
        raise ExportRefused(
            f"{files.graph} takes images of {' × '.join(str(size or '?') for size in sizes)}, and the file "
            f"beside it says {' × '.join(map(str, wanted))} (channels, height, width)."
        )
    output = _output(files, model, _IMAGE_OUTPUTS)
    rank = _rank(output)
    if rank not in (2, 4):
        raise ExportRefused(_of_shape(files, output, "(batch, dim) or (batch, dim, height, width)"))
    graph = completed_images(model, name, output.name, is_map=rank == 4)
    reference = _image_reference(files, name, _dtype(kind), output.name, transform)
    spec = BackboneSpec(
        name=source.name,
        kind="image",
        source=source.text,
        architecture=_architecture(files),
        dim=reference([_blank()]).shape[1],
        transform=transform,
        pooling="average" if rank == 4 else "in the graph",
        licence=card_licence(*files.folders),
        precision=FLOAT32,
        weights_sha256=files.sha256(),
    )
    return Network(spec, None, reference, graph=graph)


def _image_reference(
    files: OnnxFiles, name: str, kind: Any, output: str, transform: ImageTransform
) -> Callable[[Sequence[bytes]], Floats]:
    """Embed with the original graph and timm's preprocessing, one image at a time."""
    run, evaluation = _runner(files, output), evaluation_transform(transform)

    def embed(image: bytes) -> Any:
        pixels = evaluation(Image.open(io.BytesIO(image)).convert("RGB"))
        found = run({name: np.asarray(pixels, kind)[None]})[0].astype(np.float32)
        return found.mean(axis=(1, 2)) if found.ndim == 3 else found

    return lambda images: np.stack([embed(image) for image in images])


def _runner(files: OnnxFiles, output: str) -> Callable[[dict[str, Any]], Any]:
    try:
        session = open_session(files.graph, device="cpu")
    except Exception as error:  # ONNX Runtime has a class for each of its errors
        raise ExportRefused(f"ONNX Runtime cannot load {files.graph}: {error}") from error

    def run(feed: dict[str, Any]) -> Any:
        try:
            return session.run([output], feed)[0]
        except Exception as error:
            shapes = ", ".join(f"{name} {value.shape}" for name, value in feed.items())
            raise ExportRefused(f"ONNX Runtime cannot run {files.graph} on {shapes}: {error}") from error

    return run


def _check_dynamic(files: OnnxFiles, name: str, kind: Any, rank: int) -> None:
    """Raise ExportRefused unless an input has this rank, any batch size, and for texts any length."""
    sizes = kind.shape.dim
    if len(sizes) != rank:
        raise ExportRefused(
            f"{files.graph} has an input {name} of {len(sizes)} dimensions; {rank} are needed."
        )
    for place, what in ((0, "batch"), *([(1, "length")] if rank == 2 else [])):
        if sizes[place].dim_value:
            raise ExportRefused(
                f"{files.graph} has a fixed {what} of {sizes[place].dim_value} in its input {name}. "
                f"Export it with a dynamic {what}."
            )


def _output(files: OnnxFiles, model: Any, preferred: Sequence[str]) -> Any:
    outputs = {one.name: one for one in model.graph.output}
    for name in preferred:
        if name in outputs:
            return outputs[name]
    if len(outputs) != 1:
        raise ExportRefused(
            f"{files.graph} has the outputs {', '.join(outputs)}, and which one is the embedding is not "
            f"known. Keep one, or call it {preferred[0]}."
        )
    return next(iter(outputs.values()))


def _rank(output: Any) -> int:
    return len(output.type.tensor_type.shape.dim)


def _of_shape(files: OnnxFiles, output: Any, wanted: str) -> str:
    return (
        f"{files.graph} has an output {output.name} of {_rank(output)} dimensions; an embedding is {wanted}. "
        "Export it with its pooling."
    )


def _dtype(kind: Any) -> Any:
    import onnx

    return onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)


def _architecture(files: OnnxFiles) -> str:
    config = files.read("config.json")
    named = config.get("architecture") or next(iter(config.get("architectures") or ()), None)
    return str(named or "onnx")


def _blank() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    return file.getvalue()
