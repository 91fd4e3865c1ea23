"""The only place that opens an ONNX Runtime session, and the check that it runs where it was asked to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
import onnxruntime

from models.runtime.affinity import IntraOpThreads, capture_new_threads
from models.runtime.driver import gpu_name, load_libraries

# models/__init__.py has turned it off before this import; a program may have imported it earlier.
onnxruntime.disable_telemetry_events()

Device = Literal["cpu", "cuda"]

_PROVIDERS: Final[dict[Device, list[Any]]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": [
        (
            "CUDAExecutionProvider",
            {
                # TF32 rounds to 10 bits of mantissa: embeddings of one fingerprint would differ between
                # hosts. The setting takes the tensor cores from convolutions in half precision too.
                "use_tf32": "0",
                # cuDNN's first choice. DEFAULT is the slow one that always works, and EXHAUSTIVE another
                # list of choices, of which none is measured.
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


class DeviceUnavailable(RuntimeError):
    """The device asked for is not there; the message says what to do."""

    code = "device_unavailable"


def runtime_version() -> str:
    """Of ONNX Runtime."""
    return str(onnxruntime.__version__)


def open_table(path: Path) -> onnxruntime.OrtValue:
    """A large constant of a graph, mapped from its .npy file: only what is used of it is in memory, once."""
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
) -> onnxruntime.InferenceSession:
    """A session for the graph in model, a file or its bytes, on the device asked for or not at all.

    threads: of one run on the CPU, the calling one included. graphs: capture CUDA graphs; runs are then
    of one thread, with bound inputs and outputs, and name a graph each: see cuda.py. half: the graph
    computes in float16. channels_last: convolutions on a GPU have the channels of a pixel together.
    one_shape: the inputs of all runs are of few shapes. tables: constants to take from elsewhere than the
    graph, by name. The session's crew are the other threads of a run.
    Raises DeviceUnavailable: ONNX Runtime itself would go on without the GPU and say nothing. Safe to run
    from several threads.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads of one run wait for each other sixty times in a short text; waking takes a quarter of its time.
    # Between runs they must not spin, which takes the cores from decoding and from the event loop.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for name, table in tables.items():
        options.add_initializer(name, table)
    if device == "cpu":
        # The arena keeps the memory of the largest batch for ever, and the pattern plans one block per new
        # shape: right for images, whose activations are some megabytes and without the two are mapped and
        # faulted in again by each run, a lone one of which is slowed down by 6 %.
        options.enable_cpu_mem_arena = one_shape
        options.enable_mem_pattern = one_shape
    else:
        if gpu_name() is None:
            raise DeviceUnavailable(GPU_ADVICE)
        # Only for CUDA: these are gigabytes.
        load_libraries()
        # get_provider_graph_assignment_info() then says which nodes the GPU does not run.
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
    # They must live as long as the session, which does not see to that.
    session.tables = tables
    session.crew = IntraOpThreads(threads_beside)
    wanted = _PROVIDERS[device][0] if device == "cpu" else _PROVIDERS[device][0][0]
    if wanted not in session.get_providers():
        raise DeviceUnavailable(GPU_ADVICE)
    return session
