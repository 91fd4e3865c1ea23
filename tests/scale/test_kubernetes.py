"""The manifests for Kubernetes, without a cluster: their schemas, and what the schemas do not say."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
import yaml
from sqlalchemy import create_engine, text

from adapters.registry.registry import Registry
from benchmarks.harness.service_process import ROOT
from deploy.cluster.processes import NotInstalled
from deploy.cluster.proxy import FILE, find_haproxy
from tests.support.adapters.job_records import submit
from tests.support.adapters.records import create
from tests.support.storage import unavailable

FOLDER = ROOT / "deploy" / "kubernetes"
VERSION = "1.37"
DRAIN_SECONDS = 30
Resource = dict[str, Any]


def written() -> Iterator[Resource]:
    """The resources as they stand in the files."""
    for path in sorted(FOLDER.glob("*/*.yaml")):
        if path.stem != "kustomization":
            yield from yaml.safe_load_all(path.read_text())


def named(kind: str, name: str) -> Resource:
    (found,) = [one for one in written() if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def pods() -> Iterator[tuple[str, Resource]]:
    """The name of each Deployment, and what its pods are."""
    for resource in written():
        if resource["kind"] == "Deployment":
            yield resource["metadata"]["name"], resource["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    "resource",
    [pytest.param(one, id=f"{one['kind']}-{one['metadata']['name']}") for one in written()],
)
def test_a_resource_has_the_fields_of_its_kind(resource: Resource) -> None:
    if resource["apiVersion"].startswith("keda.sh/"):
        assert resource["kind"] in ("ScaledObject", "TriggerAuthentication")
        return
    kubernetes_validate.validate(resource, VERSION, strict=True)
    if "containers" in str(resource):
        resource["spec"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Always"
        with pytest.raises(kubernetes_validate.ValidationError, match="imagePulPolicy"):
            kubernetes_validate.validate(resource, VERSION, strict=True)


@pytest.mark.parametrize(("name", "pod"), list(pods()), ids=[name for name, _ in pods()])
def test_a_pod_has_few_rights_and_time_to_end(name: str, pod: Resource) -> None:
    (container,) = pod["containers"]
    rights = container["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["automountServiceAccountToken"]
    assert rights["readOnlyRootFilesystem"]
    assert not rights["allowPrivilegeEscalation"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["limits"]["memory"]
    stop = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
    assert pod["terminationGracePeriodSeconds"] >= int(stop[1]) + DRAIN_SECONDS
    ports = {port["name"] for port in container.get("ports", ())}
    probes = [probe for key, probe in container.items() if key.endswith("Probe")]
    assert {probe["httpGet"]["port"] for probe in probes} <= ports


def test_haproxy_finds_the_replicas_by_the_name_of_their_service() -> None:
    """And its file is valid with the variables of its container."""
    service = named("Service", "topwork-replicas")
    (container,) = dict(pods())["topwork-haproxy"]["containers"]
    variables = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    assert variables["REPLICAS"].startswith("topwork-replicas.$(NAMESPACE).svc.")
    assert variables["REPLICAS"].endswith(f":{service['spec']['ports'][0]['port']}")
    assert service["spec"]["clusterIP"] == "None"
    served = named("Deployment", "topwork-serve")["spec"]["template"]
    assert service["spec"]["selector"].items() <= served["metadata"]["labels"].items()
    try:
        program = find_haproxy()
    except NotInstalled as error:
        unavailable("haproxy", f"{error} is not installed")
    done = subprocess.run(
        [program, "-c", "-f", str(FILE)], env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_workers_are_scaled_by_the_jobs_that_are_there(postgres_url: str) -> None:
    (trigger,) = named("ScaledObject", "topwork-worker")["spec"]["triggers"]
    registry = Registry(postgres_url)
    registry.migrate()
    create(registry)
    engine = create_engine(postgres_url)
    counts = []
    for _ in range(2):
        with engine.connect() as connection:
            counts.append(connection.execute(text(trigger["metadata"]["query"])).scalar_one())
        submit(registry)
    engine.dispose()
    registry.close()
    assert counts == [0, 1]


@pytest.mark.parametrize("name", ["base", "keda"])
def test_kustomize_renders_it(name: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        unavailable("kubectl", "it is not installed")
    done = subprocess.run([kubectl, "kustomize", str(FOLDER / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rendered = list(yaml.safe_load_all(done.stdout))
    (file,) = [one for one in rendered if one["kind"] == "ConfigMap"]
    assert file["data"]["haproxy.cfg"] == FILE.read_text()
    (proxy,) = [
        one for one in rendered if one["metadata"]["name"] == "topwork-haproxy" and "template" in one["spec"]
    ]
    volume = proxy["spec"]["template"]["spec"]["volumes"][0]
    assert volume["configMap"]["name"] == file["metadata"]["name"]
