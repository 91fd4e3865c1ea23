"""Manifests as kubectl renders them, and what a pod's containers are told by them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness.service_process import ROOT
from tests.support.storage import unavailable

FOLDER = ROOT / "deploy" / "kubernetes"
NAMESPACE = "default"
Resource = dict[str, Any]
Secrets = Mapping[str, Mapping[str, str]]

_REFERENCE = re.compile(r"\$\(([A-Za-z_]\w*)\)")


def written() -> Iterator[Resource]:
    """The resources as they stand in the files, without patches."""
    for path in sorted(FOLDER.glob("*/*.yaml")):
        if path.stem == "kustomization":
            continue
        patches = yaml.safe_load((path.parent / "kustomization.yaml").read_text()).get("patches", ())
        if path.name not in {patch["path"] for patch in patches}:
            yield from yaml.safe_load_all(path.read_text())


def render(overlay: str | Path) -> list[Resource]:
    """The resources of the base, of an overlay, or of a folder elsewhere."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        unavailable("kubectl", "it is not installed")
    done = subprocess.run([kubectl, "kustomize", str(FOLDER / overlay)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def named(resources: Sequence[Resource], kind: str, name: str) -> Resource:
    (found,) = [one for one in resources if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def templates(resources: Sequence[Resource]) -> dict[str, Resource]:
    """What the pods of each Deployment are, by its name."""
    return {
        one["metadata"]["name"]: one["spec"]["template"] for one in resources if one["kind"] == "Deployment"
    }


def containers(pod: Resource) -> list[Resource]:
    """All containers of a pod, those first that start first."""
    return [*pod.get("initContainers", ()), *pod["containers"]]


def selects(selector: Resource, labels: Mapping[str, str]) -> bool:
    """Whether a label selector matches."""
    asked = selector.get("matchLabels", {})
    among = {one["key"]: one["values"] for one in selector.get("matchExpressions", ())}
    assert all(one["operator"] == "In" for one in selector.get("matchExpressions", ()))
    return asked.items() <= labels.items() and all(labels.get(key) in among[key] for key in among)


def variables(container: Resource, secrets: Secrets) -> dict[str, str]:
    """The environment that Kubernetes gives to a container."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        found |= secrets[source["secretRef"]["name"]]
    for one in container.get("env", ()):
        found[one["name"]] = (
            expand(one["value"], found) if "value" in one else _looked_up(container, one["valueFrom"])
        )
    return found


def expand(text: str, known: Mapping[str, str]) -> str:
    """A value or an argument, in which `$(NAME)` is the value of a variable that is known."""
    return _REFERENCE.sub(lambda found: known.get(found[1], found[0]), text)


def _looked_up(container: Resource, source: Resource) -> str:
    match source:
        case {"fieldRef": {"fieldPath": "metadata.namespace"}}:
            return NAMESPACE
        case {"resourceFieldRef": {"resource": resource}}:
            kind, _, name = resource.partition(".")
            amount = container["resources"][kind][name]
            # Kubernetes rounds up to whole ones.
            return str(-(-int(amount[:-1]) // 1000) if amount.endswith("m") else int(amount))
    raise NotImplementedError(source)
