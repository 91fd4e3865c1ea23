"""Access to NVIDIA's driver and libraries without torch: the name of the GPU, and whether it still works."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from pathlib import Path

logger = logging.getLogger("topwork")

# Libraries that ONNX Runtime's CUDA provider needs, each after its own dependencies. cuDNN loads its other
# parts itself.
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
    """The name of the first GPU, None if the driver finds none. Allocates nothing on the GPU."""
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
    """The folders of NVIDIA's libraries in installed packages, over all of Python's path."""
    found = importlib.util.find_spec("nvidia")
    places = found.submodule_search_locations if found is not None else None
    return [folder for place in places or () for folder in sorted(Path(place).glob("*/lib"))]


def load_libraries() -> None:
    """Load those of LIBRARIES that are in packages. The system's loader has to find the others."""
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
    """Whether an error, such as an illegal memory access, has made the GPU unusable for this process."""
    try:
        return bool(ctypes.CDLL("libcudart.so.13").cudaDeviceSynchronize())
    except OSError:
        return False
