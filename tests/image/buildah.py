"""buildah as an engine: images and containers in a folder of their own, without a service. As root."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

BASE = "docker.io/library/python:3.11-slim"

_PIP_OPTIONS = ("index-url", "trusted-host")
_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")


class Engine:
    """Images in `folder`. scratch: an empty folder for what goes with this object."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._scratch = scratch
        self.folder = folder
        storage, volumes = scratch / "storage.conf", scratch / "containers.conf"
        storage.write_text(
            f'[storage]\ndriver = "vfs"\ngraphroot = "{folder}/storage"\nrunroot = "{scratch}/run"\n'
        )
        volumes.write_text(f"[containers]\nvolumes = {json.dumps(self._for_builds())}\n")
        self.environment = {
            **os.environ,
            "BUILDAH_ISOLATION": "chroot",
            "STORAGE_DRIVER": "vfs",
            "CONTAINERS_STORAGE_CONF": str(storage),
            # Images of OCI's own format have no HEALTHCHECK.
            "BUILDAH_FORMAT": "docker",
        }
        self.build_environment = {**self.environment, "CONTAINERS_CONF": str(volumes)}

    def _for_builds(self) -> list[str]:
        """Package indexes of this machine, which a build uses and the image does not keep."""
        pip = _pip_configuration()
        lines = [f"{name} = {value}" for name, value in pip.items()]
        (self._scratch / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
        lines = [f'index-url = "{pip["index-url"]}"'] if "index-url" in pip else []
        (self._scratch / "uv.toml").write_text("\n".join(["system-certs = true", *lines, ""]))
        mounts = [
            f"{self._scratch}/pip.conf:/etc/pip.conf:ro",
            f"{self._scratch}/uv.toml:/etc/uv/uv.toml:ro",
        ]
        if _BUNDLE.exists():
            mounts.append(f"{_BUNDLE}:{_BUNDLE}:ro")
        cache = Path(os.environ.get("UV_CACHE_DIR") or Path.home() / ".cache" / "uv")
        if cache.is_dir():
            mounts.append(f"{cache}:/root/.cache/uv")
        return mounts

    def call(self, *arguments: str) -> str:
        """The output of buildah. Raises CalledProcessError."""
        done = subprocess.run(
            ["buildah", *arguments], env=self.environment, check=True, stdout=subprocess.PIPE, text=True
        )
        return done.stdout.strip()

    def has(self, image: str) -> bool:
        """True if an image of this name exists."""
        command = ["buildah", "inspect", "--type", "image", image]
        return subprocess.run(command, env=self.environment, capture_output=True).returncode == 0

    def make_base(self) -> None:
        """Makes the image that the Dockerfile begins with of Debian's packages: no registry is asked."""
        root = self.folder / "debian"
        shutil.rmtree(root, ignore_errors=True)
        packages = "--include=python3,python3-pip,ca-certificates"
        subprocess.run(
            ["debootstrap", "--variant=minbase", packages, "bookworm", str(root)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        # The image of that name has a Python of its own, into which pip may install.
        (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink()
        (root / "usr/bin/python").symlink_to("python3.11")
        for kept in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(root / kept)
        container = self.call("from", "scratch")
        self.call("add", "--quiet", container, str(root), "/")
        self.call("config", "--cmd", "python3", container)
        self.call("commit", "--quiet", "--rm", container, BASE)
        shutil.rmtree(root)

    def size(self, image: str) -> int:
        """Bytes of the layers of an image."""
        manifest = json.loads(json.loads(self.call("inspect", "--type", "image", image))["Manifest"])
        return sum(layer["size"] for layer in manifest["layers"])

    def configuration(self, image: str) -> dict[str, Any]:
        """As Docker's `inspect` shows it: Env, User, Volumes, Healthcheck, Entrypoint, Cmd, WorkingDir."""
        found: dict[str, Any] = json.loads(self.call("inspect", "--type", "image", image))["Docker"]["config"]
        return found

    @contextmanager
    def container(self, image: str, volume: Volume) -> Iterator[Container]:
        """A new container, removed at the end."""
        name = self.call("from", image)
        try:
            yield Container(name, self.environment, volume, self.configuration(image))
        finally:
            self.call("rm", name)


@dataclass(frozen=True)
class Volume:
    """A folder of this machine, and where containers have it."""

    folder: Path
    inside: str


class Container:
    """Runs what engines run: in the image's environment and folder, as its user, with a volume."""

    def __init__(
        self, name: str, environment: Mapping[str, str], volume: Volume, configuration: Mapping[str, Any]
    ) -> None:
        self._name = name
        self._environment = environment
        self._volume = volume
        self._command = [*configuration["Entrypoint"], *configuration["Cmd"]]
        if not volume.folder.exists():
            # As engines make a new volume: it takes over owner and mode of the image's folder.
            user, group, mode = self._call(
                ["stat", "--format", "%u %g %a", volume.inside], mounted=False
            ).split()
            volume.folder.mkdir()
            os.chown(volume.folder, int(user), int(group))
            volume.folder.chmod(int(mode, 8))

    def run(self, *command: str, **given: str) -> str:
        """`docker exec`: what a command writes to its standard output. Raises CalledProcessError."""
        return self._call(command, given)

    def start(self, log: Path, **given: str) -> subprocess.Popen[bytes]:
        """`docker run` with variables of one's own: the image's own command. The log has what it writes."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self._buildah(self._command, given),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

    def stop(self, running: subprocess.Popen[bytes], sign: signal.Signals = signal.SIGTERM) -> int:
        """`docker stop`, or `docker kill`: a signal to the first process; what it ends with."""
        os.kill(_descendant(running.pid, self._command[-1].encode()), sign)
        return running.wait(60)

    def _call(
        self, command: Sequence[str], given: Mapping[str, str] = MappingProxyType({}), mounted: bool = True
    ) -> str:
        done = subprocess.run(
            self._buildah(command, given, mounted),
            env=self._environment,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
            timeout=300,
        )
        return done.stdout.strip()

    def _buildah(self, command: Sequence[str], given: Mapping[str, str], mounted: bool = True) -> list[str]:
        options = [f"--env={name}={value}" for name, value in given.items()]
        if mounted:
            options.append(f"--volume={self._volume.folder}:{self._volume.inside}")
        return ["buildah", "run", *options, self._name, "--", *command]


def _descendant(ancestor: int, argument: bytes) -> int:
    """The first process below another, but for buildah's own, that was given this argument."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    pending = [ancestor]
    while pending:
        found = pending.pop(0)
        program, *arguments = Path(f"/proc/{found}/cmdline").read_bytes().split(b"\0")
        if argument in arguments and b"buildah" not in program:
            return found
        pending += [child for child, parent in parents.items() if parent == found]
    raise ProcessLookupError(f"nothing below {ancestor} was given {argument!r}")


def _pip_configuration() -> dict[str, str]:
    """The package indexes that pip on this machine is configured with."""
    listed = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    settings = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        if (option := name.rpartition(".")[2]) in _PIP_OPTIONS:
            settings[option] = value.strip("'\"")
    return settings
