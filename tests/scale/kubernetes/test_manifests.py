"""The manifests for Kubernetes, without a cluster: their schemas, and what the schemas do not say."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import kubernetes_validate
import pytest
from cloudcoil.models.keda import v1alpha1 as keda
from sqlalchemy import create_engine, text

from adapters.registry.registry import Registry
from benchmarks.harness.service_process import ROOT
from deploy.cluster.processes import NotInstalled
from deploy.cluster.proxy import FILE, find_haproxy
from tests.scale.kubernetes.manifests import (
    FOLDER,
    Resource,
    containers,
    named,
    render,
    selects,
    templates,
    variables,
    written,
)
from tests.support.adapters.job_records import submit
from tests.support.adapters.records import create
from tests.support.dockerfile import read
from tests.support.storage import unavailable

VERSION = "1.37"
DRAIN_SECONDS = 30
OVERLAYS = ("base", "keda", "ray")


@pytest.mark.parametrize(
    "resource",
    [pytest.param(one, id=f"{one['kind']}-{one['metadata']['name']}") for one in written()],
)
def test_a_resource_has_the_fields_of_its_kind(resource: Resource) -> None:
    validate(resource)
    if resource["kind"] == "Deployment":
        resource["spec"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Always"
        with pytest.raises(kubernetes_validate.ValidationError, match="imagePulPolicy"):
            validate(resource)
    if resource["kind"] == "ScaledObject":
        resource["spec"]["cooldownPeriods"] = 300
        with pytest.raises(AssertionError):
            validate(resource)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_rendered_resource_has_the_fields_of_its_kind(overlay: str) -> None:
    for resource in render(overlay):
        validate(resource)


def validate(resource: Resource) -> None:
    """See that Kubernetes, or KEDA, knows all fields of a resource, and that values are of their types."""
    if resource["apiVersion"] != "keda.sh/v1alpha1":
        kubernetes_validate.validate(resource, VERSION, strict=True)
        return
    found = getattr(keda, resource["kind"]).model_validate(resource)
    # A field that KEDA does not know is left out.
    assert found.model_dump(mode="json", by_alias=True, exclude_unset=True) == resource


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_have_few_rights_and_time_to_end(overlay: str) -> None:
    pods = templates(render(overlay))
    assert len(pods) == {"base": 3, "keda": 3, "ray": 5}[overlay]
    for name, template in pods.items():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"], name
        assert not pod["automountServiceAccountToken"], name
        stops = [_has_few_rights(name, container) for container in containers(pod)]
        assert pod["terminationGracePeriodSeconds"] >= max(stops) + DRAIN_SECONDS, name


def _has_few_rights(pod: str, container: Resource) -> int:
    """The seconds of its `preStop` command."""
    rights = container["securityContext"]
    assert rights["readOnlyRootFilesystem"], pod
    assert not rights["allowPrivilegeEscalation"], pod
    assert rights["capabilities"] == {"drop": ["ALL"]}, pod
    assert container["resources"]["limits"]["memory"], pod
    ports = {port["name"] for port in container.get("ports", ())}
    for probe in [probe for key, probe in container.items() if key.endswith("Probe")]:
        (asked,) = probe.keys() & {"httpGet", "tcpSocket"}
        assert probe[asked]["port"] in ports, pod
    stop = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
    assert stop[0] == "sleep", pod
    return int(stop[1])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_disruption_budget_is_of_pods_that_are_several(overlay: str) -> None:
    """One for a single pod would stop the drain of its machine for ever."""
    resources = render(overlay)
    found = set()
    for budget in (one for one in resources if one["kind"] == "PodDisruptionBudget"):
        (name,) = [
            name
            for name, template in templates(resources).items()
            if selects(budget["spec"]["selector"], template["metadata"]["labels"])
        ]
        assert named(resources, "Deployment", name)["spec"]["replicas"] > budget["spec"]["maxUnavailable"]
        found.add(name)
    ray = {"topwork-ray-node", "topwork-worker"} if overlay == "ray" else set()
    assert found == {"topwork-serve", "topwork-haproxy"} | ray


def test_only_pods_of_ray_and_workers_reach_the_ports_of_ray() -> None:
    resources = render("ray")
    pods = {name: template["metadata"]["labels"] for name, template in templates(resources).items()}
    reached = {
        target: {source for source in pods if _reaches(resources, pods[source], pods[target])}
        for target in pods
    }
    ray = {"topwork-ray-head", "topwork-ray-node", "topwork-worker"}
    assert reached == {
        **dict.fromkeys(ray, ray),
        "topwork-serve": {"topwork-haproxy"},
        "topwork-haproxy": set(pods),
    }


def _reaches(resources: Sequence[Resource], source: Mapping[str, str], target: Mapping[str, str]) -> bool:
    """Whether the policies let pods in one namespace reach any port of others."""
    policies = [
        one["spec"]
        for one in resources
        if one["kind"] == "NetworkPolicy" and selects(one["spec"]["podSelector"], target)
    ]
    assert all(one["policyTypes"] == ["Ingress"] for one in policies)
    rules = [rule for one in policies for rule in one.get("ingress", ())]
    return not policies or any(
        "from" not in rule
        or any(selects(one["podSelector"], source) for one in rule["from"] if "podSelector" in one)
        for rule in rules
    )


def test_all_of_ray_is_one_image_and_asks_for_a_token() -> None:
    """Ray refuses nodes of other versions. The image is Topwork's, and runs as its user."""
    pods = templates(render("ray"))
    found = {
        (name, container["name"]): container
        for name, template in pods.items()
        for container in containers(template["spec"])
        if name not in ("topwork-serve", "topwork-haproxy")
    }
    assert len(found) == 4
    for name, container in found.items():
        given = variables(container, {"topwork": {}, "topwork-ray": {"RAY_AUTH_TOKEN": "secret"}})
        assert (given["RAY_AUTH_MODE"], given["RAY_AUTH_TOKEN"]) == ("token", "secret"), name
        assert given["RAY_USAGE_STATS_ENABLED"] == "0", name
        assert container["image"] == "topwork-ray:latest", name
    image = read(ROOT / "deploy" / "ray" / "Dockerfile", {})
    assert (image.base, image.user) == ("topwork", "bentoml")
    (asked,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["ray"]
    (run,) = image.runs
    assert shlex.split(run)[-1] == asked
    (service,) = {
        template["spec"]["containers"][0]["image"] for name, template in pods.items() if "serve" in name
    }
    assert service == f"{image.base}:latest"


def test_haproxy_finds_the_replicas_by_the_name_of_their_service() -> None:
    """And its file is valid with the variables of its container."""
    resources = render("base")
    service = named(resources, "Service", "topwork-replicas")
    pods = templates(resources)
    (container,) = pods["topwork-haproxy"]["spec"]["containers"]
    variables = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    assert variables["REPLICAS"].startswith("topwork-replicas.$(NAMESPACE).svc.")
    assert variables["REPLICAS"].endswith(f":{service['spec']['ports'][0]['port']}")
    assert service["spec"]["clusterIP"] == "None"
    assert selects({"matchLabels": service["spec"]["selector"]}, pods["topwork-serve"]["metadata"]["labels"])
    try:
        program = find_haproxy()
    except NotInstalled as error:
        unavailable("haproxy", f"{error} is not installed")
    done = subprocess.run(
        [program, "-c", "-f", str(FILE)], env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_overlay_for_gpus_asks_for_them(tmp_path: Path) -> None:
    """The one of the documents."""
    document = (ROOT / "docs" / "how-to" / "run-jobs-on-ray.md").read_text()
    (file,) = re.findall(r"```yaml\n(.*?)```", document, re.S)
    assert "../ray" in file
    (tmp_path / "kustomization.yaml").write_text(
        file.replace("../ray", os.path.relpath(FOLDER / "ray", tmp_path.resolve()))
    )
    resources = render(tmp_path)
    for resource in resources:
        validate(resource)
    pods = templates(resources)
    (node,) = pods["topwork-ray-node"]["spec"]["containers"]
    assert node["resources"]["limits"] == {"memory": "12Gi", "nvidia.com/gpu": 1}
    (worker,) = pods["topwork-worker"]["spec"]["containers"]
    assert variables(worker, {"topwork": {}, "topwork-ray": {}})["TOPWORK_DEVICE"] == "cuda"


def test_workers_are_scaled_by_the_jobs_that_are_there(postgres_url: str) -> None:
    (trigger,) = named(render("keda"), "ScaledObject", "topwork-worker")["spec"]["triggers"]
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


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_haproxy_has_the_file_that_is_tested(overlay: str) -> None:
    rendered = render(overlay)
    (file,) = [one for one in rendered if one["kind"] == "ConfigMap"]
    assert file["data"]["haproxy.cfg"] == FILE.read_text()
    volume = templates(rendered)["topwork-haproxy"]["spec"]["volumes"][0]
    assert volume["configMap"]["name"] == file["metadata"]["name"]
