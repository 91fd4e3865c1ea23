"""`python -m benchmarks.gpu.machine FILE`: what a machine with a GPU is and does at most.

It needs torch and Pillow alone. Each figure is a line of JSON that is added to FILE as soon as it is known:
a machine that goes away in the middle leaves what was found. Without CUDA the parts that need it say so.
"""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pillow",
    "onnx",
    "tokenizers",
    "transformers",
    "pytest",
)
_SECONDS = 0.5
# Bytes of a copy, about those of 512 pictures.
_COPIED = 77_000_000
_SIZE = (640, 480)
_DECODED_TOGETHER = 64
_WORKERS = (1, 2, 4, 8, 16)

Figures = Iterator[dict[str, Any]]


class NoCuda(RuntimeError):
    """torch finds no GPU."""


def rate(run: Callable[[], object], items: int, seconds: float = _SECONDS) -> float:
    """Items a second over at least this duration, after a first run."""
    run()
    begun, runs = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        run()
        runs += 1
    return items * runs / (time.perf_counter() - begun)


def system() -> Figures:
    """The machine's hardware and software."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    yield {"versions": found, "cores": len(os.sched_getaffinity(0))}
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        yield {"gpu": subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()}
    except (OSError, subprocess.CalledProcessError) as error:
        yield {"gpu": None, "error": str(error)}
    yield {"devices": glob.glob("/dev/nvidia*"), "proc": Path("/proc/driver/nvidia").is_dir()}
    nvidia = importlib.util.find_spec("nvidia")
    places = list(nvidia.submodule_search_locations or ()) if nvidia is not None else []
    yield {"folders": sorted(one for place in places for one in os.listdir(place))}


def chip() -> Figures:
    """A product of matrices in half precision, and copies."""
    import torch

    if not torch.cuda.is_available():
        raise NoCuda
    yield {"torch": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
    side = 8192
    one = torch.randn(side, side, device="cuda", dtype=torch.float16)

    def multiply() -> None:
        torch.matmul(one, one)
        torch.cuda.synchronize()

    yield {"operations_a_second": rate(multiply, 2 * side**3)}
    there = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")

    def move() -> None:
        there[: 1 << 29].copy_(there[1 << 29 :])
        torch.cuda.synchronize()

    yield {"bytes_a_second_on_the_device": rate(move, 1 << 30)}
    for pinned in (False, True):
        here = torch.zeros(_COPIED, dtype=torch.uint8, pin_memory=pinned)

        def copy(here: torch.Tensor = here) -> None:
            there[:_COPIED].copy_(here)
            torch.cuda.synchronize()

        yield {"bytes_a_second_to_the_device": rate(copy, _COPIED), "pinned": pinned}


def jpeg(seed: int = 0, size: tuple[int, int] = _SIZE) -> bytes:
    """A photograph's size of grain, at quality 90."""
    random = np.random.default_rng(seed)
    pixels = random.normal(random.uniform(60, 200, 3), 9, (size[1], size[0], 3)).clip(0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def decode(data: bytes) -> int:
    """As the service prepares a picture, about: decoding, then resizing to a shorter side of 224."""
    with Image.open(io.BytesIO(data)) as opened:
        picture = opened.convert("RGB")
    return picture.resize((298, 224), Image.Resampling.BICUBIC).width


def decoding_on_the_gpu() -> Figures:
    """torchvision's decoder, and resizing there beside Pillow's."""
    import torch
    import torchvision

    if not torch.cuda.is_available():
        raise NoCuda
    files = [jpeg(seed) for seed in range(_DECODED_TOGETHER)]
    encoded = [torch.frombuffer(bytearray(one), dtype=torch.uint8) for one in files]

    def decode_all() -> Any:
        pictures = torchvision.io.decode_jpeg(encoded, device="cuda")
        torch.cuda.synchronize()
        return pictures

    yield {"decoded_a_second": rate(decode_all, len(files))}
    pictures = torch.stack(decode_all())

    def resize() -> Any:
        resized = torch.nn.functional.interpolate(
            pictures.float(), size=(224, 298), mode="bicubic", antialias=True
        )
        torch.cuda.synchronize()
        return resized

    yield {"resized_a_second": rate(resize, len(files))}
    with Image.open(io.BytesIO(files[0])) as opened:
        theirs = np.asarray(opened.convert("RGB").resize((298, 224), Image.Resampling.BICUBIC), np.float64)
    ours = resize()[0].permute(1, 2, 0).clamp(0, 255).cpu().numpy().astype(np.float64)
    yield {"cosine_to_pillow": float((ours * theirs).sum() / np.linalg.norm(ours) / np.linalg.norm(theirs))}


def decoding() -> Figures:
    """Pillow, in threads and in processes: what is behind it with threads is the interpreter's lock."""
    files = [jpeg(seed) for seed in range(_DECODED_TOGETHER)]
    cores = len(os.sched_getaffinity(0))
    kinds: Sequence[tuple[str, type[Executor]]] = (
        ("threads", ThreadPoolExecutor),
        ("processes", ProcessPoolExecutor),
    )
    for kind, make in kinds:
        for workers in (count for count in _WORKERS if count <= max(2, cores)):
            with make(workers) as pool:  # type: ignore[call-arg]

                def decode_all(pool: Executor = pool) -> None:
                    list(pool.map(decode, files, chunksize=4))

                yield {"kind": kind, "workers": workers, "pictures_a_second": rate(decode_all, len(files))}


def network() -> Figures:
    """timm's EfficientNet-Lite0 with random weights, float16, channels last, as a CUDA graph."""
    import timm
    import torch

    if not torch.cuda.is_available():
        raise NoCuda
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0).eval().half()
    model = model.to("cuda", memory_format=torch.channels_last)
    for count in (1, 8, 32, 128, 256):
        pixels = torch.randn(count, 3, 224, 224, device="cuda", dtype=torch.float16)
        pixels = pixels.to(memory_format=torch.channels_last)
        beside = torch.cuda.Stream()
        with torch.inference_mode():
            with torch.cuda.stream(beside):
                for _ in range(3):
                    model(pixels)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(pixels)

        def run(graph: Any = graph) -> None:
            graph.replay()
            torch.cuda.synchronize()

        yield {"count": count, "images_a_second": rate(run, count)}


def main() -> int:
    """See the module; 1 where a part fails for another reason than that there is no GPU."""
    failed = 0
    with Path(sys.argv[1]).open("a", encoding="utf-8") as file:
        for part in (system, chip, network, decoding, decoding_on_the_gpu):
            begun = time.perf_counter()
            try:
                for figures in part():
                    _note(file, part.__name__, figures)
            except NoCuda:
                _note(file, part.__name__, {"skipped": "torch finds no GPU"})
            except Exception as error:
                failed = 1
                _note(file, part.__name__, {"error": f"{type(error).__name__}: {error}"})
            _note(file, part.__name__, {"seconds": time.perf_counter() - begun})
    return failed


def _note(file: io.TextIOBase, part: str, figures: dict[str, Any]) -> None:
    line = json.dumps({"part": part, **figures})
    print(line, flush=True)
    file.write(line + "\n")
    file.flush()


if __name__ == "__main__":
    raise SystemExit(main())
