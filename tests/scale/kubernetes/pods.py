"""Pods as processes of this machine, from manifests.

A pod has a network of its own; a container has processes of its own (unless its pod shares them), the user
of its pod, no capabilities, volumes, and a root that it cannot write. That root shows this machine's files
instead of an image's. Not as in a cluster: limits of memory and CPU and network policies are not enforced,
a container that ends is not started again, the name of a Service means the addresses of its pods even if it
has an address of its own, and `preStop` runs outside of its container.
"""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx

from benchmarks.harness.service_process import ROOT
from deploy.cluster.processes import bound, launch
from tests.scale.kubernetes.manifests import (
    Resource,
    Secrets,
    containers,
    expand,
    named,
    selects,
    variables,
)
from tests.scale.kubernetes.network import DOMAIN, RESOLVER, Network
from tests.support.conditions import until

# The signal that stops an image, if it is not SIGTERM.
_STOP_SIGNALS = {"haproxy": signal.SIGUSR1}
_PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_START_SECONDS = 120.0


class Container:
    """A running container of a pod."""

    def __init__(self, manifest: Resource, process: subprocess.Popen[bytes], log: Path) -> None:
        self.manifest = manifest
        self.process = process
        self._log = log

    def log(self) -> str:
        """What it wrote."""
        return self._log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def root(self) -> Path:
        """Its root folder, as long as it runs."""
        return Path(f"/proc/{self._first()}/root")

    def stop(self) -> None:
        """Run the `preStop` command, and send the signal of its image."""
        hook = self.manifest.get("lifecycle", {}).get("preStop")
        if hook is not None:
            subprocess.run(hook["exec"]["command"], check=True)
        image = self.manifest["image"].partition(":")[0]
        os.kill(self._first(), _STOP_SIGNALS.get(image, signal.SIGTERM))

    def kill(self) -> None:
        """End it with everything that it started."""
        if self.running:
            os.kill(self._first(), signal.SIGKILL)
            self.process.wait()

    def _first(self) -> int:
        """Its first process, whose parent waits outside."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else pid


class Pod:
    """A running pod of a Deployment. `address`: its address in the network."""

    def __init__(self, template: Resource, folder: Path, network: Network) -> None:
        folder.mkdir()
        self.labels: Mapping[str, str] = template["metadata"]["labels"]
        self.spec: Resource = template["spec"]
        self.folder = folder
        self.containers: list[Container] = []
        # It holds the namespaces, like the pause container of a cluster.
        pause = ["unshare", "--net", "--pid", "--fork", "--kill-child", "sleep", "infinity"]
        self.pause = subprocess.Popen([*bound(signal.SIGKILL), *pause])
        until(lambda: _network(self.pause.pid) != _network(os.getpid()))
        self.address = network.join(self.pause.pid)

    @property
    def running(self) -> bool:
        """Whether none of its containers has ended."""
        return all(one.running for one in self.containers)

    def passes(self, container: Resource, probe: Resource) -> bool:
        """Whether a probe of a container succeeds now."""
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        match probe:
            case {"httpGet": {"path": path, "port": name}}:
                try:
                    found = httpx.get(f"http://{self.address}:{ports[name]}{path}", timeout=10)
                except httpx.TransportError:
                    return False
                return found.status_code == 200
            case {"tcpSocket": {"port": name}}:
                return self.listens(ports[name])
        raise NotImplementedError(probe)

    def listens(self, port: int) -> bool:
        """Whether it accepts connections."""
        try:
            socket.create_connection((self.address, port), 5).close()
        except OSError:
            return False
        return True

    def log(self) -> str:
        """What its containers wrote."""
        return "".join(f"--- {one.manifest['name']}\n{one.log()}" for one in self.containers)

    def await_probe(self, container: Resource, probe: Resource) -> None:
        """Return once a probe succeeds; fail if a container ends before."""

        def passed() -> bool:
            assert self.running, self.log()
            return self.passes(container, probe)

        until(passed, _START_SECONDS)

    def kill(self) -> None:
        """End it at once."""
        for container in self.containers:
            container.kill()
        self.pause.kill()
        self.pause.wait()


class Cluster:
    """Runs pods of Deployments.

    `pods`: all that were started. `image`: the variables that images set. `files`: what of this machine is
    seen in the pods, and where.
    """

    def __init__(
        self,
        resources: Sequence[Resource],
        secrets: Secrets,
        network: Network,
        folder: Path,
        *,
        image: Mapping[str, str],
        files: Mapping[Path, str],
    ) -> None:
        self._resources = resources
        self._secrets = secrets
        self._network = network
        self._folder = folder
        self._image = {"PATH": _PATH, **image}
        programs = (ROOT, Path(sys.prefix), Path(sys.base_prefix))
        self._files = {**{path: str(path) for path in programs}, **files}
        self._numbers = itertools.count(1)
        self.pods: list[Pod] = []
        self._ready: list[Pod] = []

    def start(self, deployment: str) -> Pod:
        """A new pod, once it is ready."""
        template = named(self._resources, "Deployment", deployment)["spec"]["template"]
        pod = Pod(template, self._folder / f"{deployment}-{next(self._numbers)}", self._network)
        self.pods.append(pod)
        volumes = {one["name"]: self._volume(pod, one) for one in pod.spec["volumes"]}
        for manifest in containers(pod.spec):
            pod.containers.append(self._run(pod, manifest, volumes))
            for kind in ("startupProbe", "readinessProbe"):
                if kind in manifest:
                    pod.await_probe(manifest, manifest[kind])
        self._ready.append(pod)
        self._publish()
        return pod

    def end(self, pod: Pod) -> dict[str, int]:
        """End a pod as Kubernetes does. What its containers ended with; fails if they do not end in time."""
        end = time.monotonic() + pod.spec["terminationGracePeriodSeconds"]
        self._ready.remove(pod)
        self._publish()
        found = {}
        # Sidecars, which started first, end last.
        for container in reversed(pod.containers):
            container.stop()
            found[container.manifest["name"]] = container.process.wait(end - time.monotonic())
        return found

    def close(self) -> None:
        """End everything at once."""
        for pod in self.pods:
            pod.kill()

    def _publish(self) -> None:
        self._network.addresses = {
            f"{one['metadata']['name']}.{DOMAIN}": tuple(
                pod.address
                for pod in self._ready
                if selects({"matchLabels": one["spec"]["selector"]}, pod.labels)
            )
            for one in self._resources
            if one["kind"] == "Service"
        }

    def _volume(self, pod: Pod, volume: Resource) -> Path:
        folder: Path = pod.folder / volume["name"]
        folder.mkdir()
        match volume:
            case {"emptyDir": _}:
                return folder
            case {"configMap": {"name": name}}:
                for file, content in named(self._resources, "ConfigMap", name)["data"].items():
                    (folder / file).write_text(content)
                return folder
        raise NotImplementedError(volume)

    def _run(self, pod: Pod, manifest: Resource, volumes: Mapping[str, Path]) -> Container:
        mounts = {one["mountPath"]: volumes[one["name"]] for one in manifest["volumeMounts"]}
        constant = [one["mountPath"] for one in manifest["volumeMounts"] if one.get("readOnly")]
        known = variables(manifest, self._secrets)
        words = [expand(word, known) for word in (*manifest["command"], *manifest.get("args", ()))]
        users = pod.spec["securityContext"]
        root = pod.folder / f"root-{manifest['name']}"
        root.mkdir()
        program = [
            "unshare",
            *(f"--map-user={users['runAsUser']}", f"--map-group={users['runAsGroup']}"),
            *("--user", f"--root={root}", "--wd=/", "setpriv", "--no-new-privs", "--", "env", "-i"),
            *(f"{name}={value}" for name, value in {**self._image, **known}.items()),
            *words,
        ]
        lines = [
            *_root(root, pod, mounts, self._files),
            *(f"mount -o remount,bind,ro {root}{path}" for path in constant),
            f"exec {shlex.join(program)}",
        ]
        log = pod.folder / f"{manifest['name']}.log"
        held = f"/proc/{pod.pause.pid}/ns"
        apart = ["nsenter", f"--net={held}/net", "unshare", "--mount", "--pid", "--fork", "--kill-child"]
        if pod.spec.get("shareProcessNamespace"):
            apart = ["nsenter", f"--net={held}/net", f"--pid={held}/pid_for_children", "unshare", "--mount"]
        process = launch([*bound(signal.SIGKILL), *apart, "sh", "-ec", "\n".join(lines)], log)
        return Container(manifest, process, log)


def _root(root: Path, pod: Pod, mounts: Mapping[str, Path], files: Mapping[Path, str]) -> Iterator[str]:
    """Commands that put together the root of a container: this machine's, with its own files and volumes."""
    user, group = (pod.spec["securityContext"][key] for key in ("runAsUser", "runAsGroup"))
    own = {
        "etc/passwd": f"root:x:0:0::/root:/bin/sh\ntopwork:x:{user}:{group}::/home/bentoml:/bin/sh\n",
        "etc/resolv.conf": RESOLVER,
        "etc/hosts": f"127.0.0.1 localhost\n{pod.address} {pod.folder.name}\n",
    }
    sources = {path: str(source) for source, path in files.items()}
    # Layers must not lie in each other, so this machine's is the lower one and the upper one is in memory.
    yield f"mount -t tmpfs own {root}"
    yield f"mkdir {root}/own"
    folders = {*mounts, *(str(Path(path).parent) for path in sources), "/etc"}
    folders |= {path for path, source in sources.items() if Path(source).is_dir()}
    yield f"mkdir -p {shlex.join(f'{root}/own{folder}' for folder in sorted(folders))}"
    for name, content in own.items():
        yield f"printf %s {shlex.quote(content)} > {root}/own/{name}"
    yield f"mount -t overlay own -o lowerdir={root}/own:/ {root}"
    yield f"mount --rbind /dev {root}/dev"
    yield f"mount --rbind /sys {root}/sys"
    yield f"mount -t proc proc {root}/proc"
    # The variables that an engine sets in a container.
    yield f"mount -t tmpfs -o size=64m shm {root}/dev/shm"
    for path, volume in sorted(mounts.items()):
        yield shlex.join(["mount", "--bind", str(volume), f"{root}{path}"])
    for path, source in sorted(sources.items()):
        target = shlex.quote(f"{root}{path}")
        if Path(source).is_dir():
            yield f"mkdir -p {target}"
            yield f"mount --rbind {shlex.quote(source)} {target}"
            yield f"mount -o remount,bind,ro {target}"
        else:
            yield f"mkdir -p $(dirname {target}); [ -e {target} ] || : > {target}"
            yield f"mount --bind {shlex.quote(source)} {target}"


def _network(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")
