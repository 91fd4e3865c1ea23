"""Opening of ONNX Runtime sessions, here only, with a check that they run on the requested device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import onnxruntime

from models.errors import DomainError
from models.runtime.affinity import IntraOpThreads, capture_new_threads
from models.runtime.driver import gpu_name, load_libraries

# models/__init__.py turns telemetry off before this import, but a program may have imported it earlier.
onnxruntime.disable_telemetry_events()

Session: TypeAlias = onnxruntime.InferenceSession
Device = Literal["cpu", "cuda"]

_PROVIDERS: Final[dict[Device, list[Any]]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": [
        (
            "CUDAExecutionProvider",
            {
                # TF32 rounds to 10 bits of mantissa, so embeddings of one fingerprint would differ between
                # hosts. "0" also keeps half precision convolutions off the tensor cores; see open_session.
                "use_tf32": "0",
                # HEURISTIC takes cuDNN's first choice. DEFAULT is slow but always works, and EXHAUSTIVE
                # has another list of choices, none of which it measures.
                "cudnn_conv_algo_search": "HEURISTIC",
                "arena_extend_strategy": "kSameAsRequested",
            },
        ),
        "CPUExecutionProvider",
    ],
}

GPU_ADVICE = (
    "A GPU was asked for and ONNX Runtime cannot use one. Check that `nvidia-smi` lists a GPU here, that its "
    "driver supports CUDA 13, and that onnxruntime-gpu[cuda,cudnn] is installed without onnxruntime beside "
    "it; or set the device to cpu."
)


class DeviceUnavailable(DomainError):
    """The requested device is not available; the message says what to do."""

    code = "device_unavailable"


def runtime_version() -> str:
    """The version of ONNX Runtime."""
    return str(onnxruntime.__version__)


def open_table(path: Path) -> onnxruntime.OrtValue:
    """Map a large constant from its .npy file: sessions share it, and only the used parts are in memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.load(path, mmap_mode="r", allow_pickle=False))


def open_session(
    model: Path | bytes,
    *,
    device: Device,
    threads: int = 1,
    graphs: bool = False,
    half: bool = False,
    channels_last: bool = False,
    one_shape: bool = False,
    tables: Mapping[str, onnxruntime.OrtValue] = MappingProxyType({}),
) -> Session:
    """Open a session for a graph, given as a file or as bytes, on the requested device only.

    `threads`: per run on the CPU, the calling thread included. `graphs`: capture CUDA graphs; all runs must
    then come from one thread, with bound inputs and outputs and the id of a graph, see cuda.py. `half`: the
    graph computes in float16. `channels_last`: NHWC convolutions on a GPU. `one_shape`: inputs have few
    different shapes. `tables`: constants by name that replace those of the graph. The session's `crew` holds
    the other threads of a run. Sessions can be run from several threads.

    Raises DeviceUnavailable; ONNX Runtime itself would silently continue without the GPU.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # The threads of one run wait for each other sixty times per short text; waking them would take a quarter
    # of its time, so they spin. Between runs they must not: decoding and the event loop need the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for name, table in tables.items():
        options.add_initializer(name, table)
    if device == "cpu":
        # The arena never returns the memory of the largest batch, and the pattern plans a block per shape.
        # This suits images: otherwise each run would map and fault in megabytes of activations again, which
        # slows a single run down by 6 %.
        options.enable_cpu_mem_arena = one_shape
        options.enable_mem_pattern = one_shape
    else:
        if gpu_name() is None:
            raise DeviceUnavailable(GPU_ADVICE)
        # The libraries are loaded only for CUDA, because they take gigabytes.
        load_libraries()
        # This entry makes get_provider_graph_assignment_info() tell which nodes the GPU does not run.
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers = _PROVIDERS[device]
    if device == "cuda":
        name, settings = providers[0]
        wished = {"enable_cuda_graph": graphs, "use_tf32": half, "prefer_nhwc": channels_last}
        settings = settings | {key: "1" for key, value in wished.items() if value}
        providers = [(name, settings), *providers[1:]]
    with capture_new_threads() as threads_beside:
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=providers,
            enable_fallback=0,
        )
    # The tables must live as long as the session, which does not keep them alive itself.
    session.tables = tables
    session.crew = IntraOpThreads(threads_beside)
    wanted = _PROVIDERS[device][0] if device == "cpu" else _PROVIDERS[device][0][0]
    if wanted not in session.get_providers():
        raise DeviceUnavailable(GPU_ADVICE)
    return session
