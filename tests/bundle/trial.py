"""`make test-gpu-bundle`: makes the GPU bundle, and runs its command lines in a bare folder, without CUDA.

There is a copy of this tree, a Python with torch and what fits to it, and neither network nor virtual
environment. Each command finds what it carries, and no other part. In some minutes and 10 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.bundle import COMMANDS, FOLDER, Command, requirements
from benchmarks.harness.service_process import ROOT

# An absolute path: the commands must run on any machine.
_PATH = re.compile(r"(?<![\w.])/(?!bin/sh)\w")

# Dependencies of torch, timm and transformers that the bundle brings in versions of its own.
_BESIDE = (
    "filelock", "fsspec", "httpx", "jinja2", "packaging", "pillow", "pytest", "pyyaml", "tqdm", "typer",
    "typing-extensions",
)  # fmt: skip


def main() -> int:
    """0 if all that can be done without a GPU is done; raises what is wrong otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.bundle.trial", description=__doc__)
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}")
    parser.add_argument("--preset", default="1", help="of xz (default: %(default)s, which is fast)")
    parser.add_argument("--part-bytes", default="62000000")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="topwork-bare-") as name:
        folder = Path(name)
        bundle, tree, python = folder / "bundle", folder / "tree", folder / "python"
        making = [sys.executable, "-m", "benchmarks.gpu.bundle", "--folder", str(bundle)]
        making += ["--python", options.python, "--preset", options.preset, "--part-bytes", options.part_bytes]
        subprocess.run(making, check=True, cwd=ROOT)
        copy_tree(tree)
        make_python(python, options.python)
        environment = {
            "PATH": f"{python / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "OUT": str(folder / "out"),
            "DEVICE": "cpu",
            "SECONDS_EACH": "0.3",
        }
        (folder / "out").mkdir()
        for command in commands(bundle):
            assert not _PATH.search(command.command), command
            run(command, tree, bundle, environment)
        look_at(folder / "out/results.tar.gz")
    print("The bundle does what can be done without a GPU.")
    return 0


def copy_tree(tree: Path) -> None:
    """The files under version control, with local changes."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)


def make_python(folder: Path, version: str) -> None:
    """A Python with what the bundle expects to find, and with pytest."""
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "--quiet", "--python", version, str(folder)], check=True)
    wanted = folder / "requirements.txt"
    wanted.write_text("\n".join(requirements(version, there=True)))
    installing = [uv, "pip", "install", "--quiet", "--python", str(folder)]
    subprocess.run([*installing, "--no-deps", "--require-hashes", "-r", str(wanted)], check=True)
    subprocess.run([*installing, *_BESIDE], check=True)


def commands(bundle: Path) -> Iterator[Command]:
    """The command lines, in their order."""
    for line in (bundle / COMMANDS).read_text().splitlines():
        told: dict[str, Any] = json.loads(line)
        yield Command(tuple(told["carry"]), told["timeout_s"], told["command"])


def run(command: Command, tree: Path, bundle: Path, environment: dict[str, str]) -> None:
    """Runs it with what it carries and no network. Raises CalledProcessError."""
    shutil.rmtree(tree / FOLDER, ignore_errors=True)
    for name in command.carry:
        (tree / name).parent.mkdir(exist_ok=True)
        shutil.copy2(bundle / Path(name).name, tree / name)
    print(f"$ {command.command}", flush=True)
    alone = f"ip link set lo up && exec sh -c '{command.command}'"
    subprocess.run(
        ["unshare", "--map-root-user", "--net", "sh", "-c", alone], cwd=tree, env=environment, check=True
    )


def look_at(results: Path) -> None:
    """Raises where a figure is missing that can be had without a GPU."""
    with tarfile.open(results) as archive:
        names = {Path(name).name for name in archive.getnames()}
        missing = {"machine.jsonl", "junit.xml", "training.jsonl"} - names
        assert not missing, f"no {missing} in {names}"


if __name__ == "__main__":
    raise SystemExit(main())
