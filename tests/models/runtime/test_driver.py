"""The installed packages contain the libraries that a GPU needs, in the right versions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

from models.runtime.driver import LIBRARIES, gpu_name, library_folders
from models.runtime.session import DeviceUnavailable, open_session
from models.spec import GRAPH_FILE
from tests.support.models import tiny_backbones

PROVIDER = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
# Libraries of the system, of every driver, and of ONNX Runtime's own package.
ELSEWHERE = ("libc.", "libm.", "libdl.", "librt.", "libpthread.", "libgcc_s.", "libstdc++.", "ld-linux")
DRIVER = "libcuda.so.1"
OWN = "libonnxruntime_providers_shared.so"


def needed(library: Path) -> set[str]:
    """The libraries without which it cannot be loaded, those of the system apart."""
    with library.open("rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        assert isinstance(dynamic, DynamicSection)
        names: set[str] = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}  # type: ignore[attr-defined]
    return {name for name in names if not name.startswith(ELSEWHERE)}


def test_every_library_that_onnx_runtime_needs_is_in_a_package() -> None:
    folders = library_folders()
    installed = {name: folder / name for name in LIBRARIES for folder in folders if (folder / name).is_file()}
    assert set(LIBRARIES) == set(installed)
    wanted = needed(PROVIDER)
    assert DRIVER in wanted, "the provider is another one than this test knows"
    assert wanted - {DRIVER, OWN} <= set(LIBRARIES)
    # Each stands behind what it needs itself, or that lies beside it.
    for place, name in enumerate(LIBRARIES):
        for other in needed(installed[name]) - {DRIVER}:
            assert other in LIBRARIES[:place] or (installed[name].parent / other).is_file(), (name, other)


def test_the_libraries_can_be_loaded_without_torch_and_without_a_gpu() -> None:
    program = (
        "import sys; from pathlib import Path; from models.runtime.driver import LIBRARIES, load_libraries\n"
        "load_libraries(); maps = Path('/proc/self/maps').read_text()\n"
        "print([name for name in LIBRARIES if name not in maps], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False", done.stderr


@pytest.mark.skipif(gpu_name() is not None, reason="there is a GPU here")
def test_without_a_gpu_it_is_said_what_to_do(tmp_path: Path) -> None:
    export = tiny_backbones.text_export(tmp_path)
    with pytest.raises(DeviceUnavailable, match="nvidia-smi"):
        open_session(export / GRAPH_FILE, device="cuda")
