"""NVIDIA's driver and libraries, without torch: which GPU there is, and whether it still works."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from pathlib import Path

logger = logging.getLogger("topwork")

# What ONNX Runtime's CUDA provider needs, each behind what it needs itself. cuDNN loads its other parts.
LIBRARIES = (
    "libcudart.so.13",
    "libnvJitLink.so.13",
    "libnvrtc.so.13",
    "libcublasLt.so.13",
    "libcublas.so.13",
    "libcufft.so.12",
    "libcurand.so.10",
    "libcudnn.so.9",
)
_NAME_LENGTH = 256


def gpu_name() -> str | None:
    """The name of the first GPU, None where the driver finds none. Nothing is allocated there."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(_NAME_LENGTH)
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGetCount(ctypes.byref(count))
        or not count.value
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, _NAME_LENGTH, device)
    )
    return None if failed else name.value.decode(errors="replace")


def library_folders() -> list[Path]:
    """Where the installed packages have NVIDIA's libraries, in all folders of Python's path."""
    found = importlib.util.find_spec("nvidia")
    places = found.submodule_search_locations if found is not None else None
    return [folder for place in places or () for folder in sorted(Path(place).glob("*/lib"))]


def load_libraries() -> None:
    """Loads what the packages have of LIBRARIES. What they lack, the system's loader is left to find."""
    folders = library_folders()
    for name in LIBRARIES:
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            continue
        try:
            ctypes.CDLL(str(path))
        except OSError as error:
            logger.warning("%s cannot be loaded: %s", path, error)


def is_lost() -> bool:
    """Whether an error on the GPU has made it useless for this process, as an illegal access does."""
    try:
        return bool(ctypes.CDLL("libcudart.so.13").cudaDeviceSynchronize())
    except OSError:
        return False
