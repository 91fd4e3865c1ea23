"""What the files beside an ONNX graph say about its preprocessing and its pooling."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from models.sources.onnx_files import OnnxFiles
from models.sources.source import ExportRefused
from models.spec import TOKENIZER_FILE, ImageTransform, TextTransform

Pooling = Literal["mean", "cls"]

_MOST_TOKENS = 512  # where nothing says how many a network takes
# Tokenizers without a limit name a number such as 10^30.
_NO_LIMIT = 1_000_000
# Pillow's numbers of the interpolations that `resample` names.
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
# Modules of sentence-transformers that a graph's token embeddings can be completed with.
_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, slots=True)
class TextDescription:
    """How texts become token ids, and token embeddings a text's embedding."""

    transform: TextTransform
    tokenizer: bytes
    pooling: Pooling
    normalised: bool


def read_text_description(files: OnnxFiles) -> TextDescription:
    """Read the tokenizer and what is said about the pooling. Raises ExportRefused.

    Without modules.json, token embeddings are averaged and normalised.
    """
    from tokenizers import Tokenizer

    path = files.find(TOKENIZER_FILE)
    if path is None:
        looked = " and ".join(str(folder) for folder in files.folders)
        raise ExportRefused(
            f"{files.graph} takes texts, and there is no {TOKENIZER_FILE} in {looked}. "
            "Copy the one that the network was trained with."
        )
    serialised = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(serialised)
    except Exception as error:  # the library raises nothing more specific
        raise ExportRefused(f"{path} is not a tokenizer: {error}.") from error
    pooling, normalised, include_prompt = _pooling(files)
    prompts = files.read("config_sentence_transformers.json")
    prompt = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name") or "") or ""
    if prompt and not include_prompt:
        raise ExportRefused(f"{files.graph} leaves its prompt out of the pooling, which is not supported.")
    transform = TextTransform(
        max_tokens=_max_tokens(files, tokenizer),
        tokenizer_sha256=hashlib.sha256(serialised).hexdigest(),
        pad_id=_pad_id(files, tokenizer),
        prompt=prompt,
    )
    return TextDescription(transform, serialised, pooling, normalised)


def _pooling(files: OnnxFiles) -> tuple[Pooling, bool, bool]:
    """The pooling, whether a normalisation follows, and whether the prompt's tokens count."""
    config = files.read("1_Pooling/config.json")
    modules = files.read("modules.json")
    normalised = not modules
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in _MODULES:
            raise ExportRefused(
                f"{files.find('modules.json')} lists a module {kind}, which is not in the graph and cannot "
                "be added. Export a graph with the output sentence_embedding."
            )
        normalised = normalised or kind == "Normalize"
    # Two releases of sentence-transformers write this in two ways.
    modes = [name for name, asked in config.items() if name.startswith("pooling_mode_") and asked]
    named = config.get("pooling_mode") or [
        {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}.get(mode, mode)
        for mode in modes
    ]
    named = named if isinstance(named, list) else [named]
    if named not in ([], ["mean"], ["cls"]):
        raise ExportRefused(
            f"{files.find('1_Pooling/config.json')} asks for the pooling {', '.join(map(str, named))}; "
            "mean and cls are supported."
        )
    return ("cls" if named == ["cls"] else "mean"), normalised, bool(config.get("include_prompt", True))


def _max_tokens(files: OnnxFiles, tokenizer: Any) -> int:
    config = files.read("config.json")
    positions = config.get("max_position_embeddings")
    if positions and config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        # Their positions begin after that of the padding.
        positions -= 2
    limits = [
        files.read("sentence_bert_config.json").get("max_seq_length"),
        files.read("tokenizer_config.json").get("model_max_length"),
        positions,
    ]
    known = [int(limit) for limit in limits if limit and 0 < limit < _NO_LIMIT]
    if not known and tokenizer.truncation:
        known = [tokenizer.truncation["max_length"]]
    return min(known, default=_MOST_TOKENS)


def _pad_id(files: OnnxFiles, tokenizer: Any) -> int:
    token = files.read("tokenizer_config.json").get("pad_token")
    token = token.get("content") if isinstance(token, Mapping) else token
    found = tokenizer.token_to_id(token) if token else None
    if found is None and tokenizer.padding:
        found = tokenizer.padding["pad_id"]
    if found is None:
        found = files.read("config.json").get("pad_token_id")
    return int(found or 0)


def read_image_transform(files: OnnxFiles) -> ImageTransform:
    """Read the preprocessing from timm's config.json or a preprocessor_config.json. Raises ExportRefused."""
    config = files.read("config.json")
    config = config.get("pretrained_cfg") or config
    if "input_size" in config:
        return _as_timm(config, files.find("config.json"))
    found = files.find("preprocessor_config.json")
    if found is None:
        raise ExportRefused(
            f"{files.graph} takes images, and nothing beside it says how they are prepared. Add timm's "
            "config.json (input_size, mean, std, crop_pct, interpolation) or a preprocessor_config.json."
        )
    return _as_transformers(files.read("preprocessor_config.json"), found)


def _as_timm(config: Mapping[str, Any], where: Any) -> ImageTransform:
    try:
        channels, height, width = config["input_size"]
        mode = config.get("crop_mode") or "center"
        if channels != 3 or height != width or mode not in ("center", "squash"):
            raise ExportRefused(
                f"{where} says {channels} × {height} × {width} and crop_mode {mode}; square RGB images are "
                "supported, and the crop modes center and squash."
            )
        return _transform(
            height,
            config.get("crop_pct") or 1.0,
            config["interpolation"],
            config["mean"],
            config["std"],
            mode,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ExportRefused(f"{where} does not say how images are prepared: {error!r}.") from error


def _as_transformers(config: Mapping[str, Any], where: Any) -> ImageTransform:
    """Read a preprocessor_config.json: a shortest edge with a crop, or a size to squash images to."""
    try:
        interpolation = _RESAMPLING[config.get("resample", 2)]
        size = config["size"]
        edge = size if isinstance(size, int) else size.get("shortest_edge")
        cropped = config.get("crop_size") if config.get("do_center_crop") else None
        if edge is not None and config.get("crop_pct"):
            # ConvNeXt's edge is that of the crop.
            side, crop, mode = edge, config["crop_pct"], "center"
        elif edge is not None and cropped is not None:
            side = cropped if isinstance(cropped, int) else cropped["height"]
            crop, mode = side / edge, "center"
        elif isinstance(size, Mapping) and "height" in size and cropped is None:
            if size["height"] != size["width"]:
                raise ExportRefused(f"{where} asks for images that are not square.")
            side, crop, mode = size["height"], 1.0, "squash"
        else:
            raise ExportRefused(
                f"{where} describes a way to resize that is not supported. It should have `size` with height "
                "and width, or with shortest_edge and a `crop_size`."
            )
        plain = config.get("do_normalize", True) is False
        mean = [0.0] * 3 if plain else config["image_mean"]
        std = [1.0] * 3 if plain else config["image_std"]
        return _transform(side, crop, interpolation, mean, std, mode)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExportRefused(f"{where} does not say how images are prepared: {error!r}.") from error


def _transform(side: int, crop: float, interpolation: str, mean: Any, std: Any, mode: str) -> ImageTransform:
    if len(mean) != 3 or len(std) != 3 or not all(std):
        raise ValueError("mean and std need three numbers each")
    return ImageTransform(
        size=int(side),
        crop=float(crop),
        interpolation=interpolation,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        crop_mode="fold" if mode == "center" else mode,
    )
