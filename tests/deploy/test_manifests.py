"""The Kubernetes manifests: what kustomize makes of them is valid, fits together, and fits the image."""

from __future__ import annotations

import copy
import functools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.schemas import Document, InvalidManifestError, require_valid

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
OVERLAYS = ("small", "large", "job")

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kustomize comes with kubectl")


@functools.cache
def rendered(overlay: str) -> tuple[Document, ...]:
    """The documents that `kubectl apply -k` would send."""
    command = ["kubectl", "kustomize", str(KUBERAY / overlay)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return tuple(yaml.safe_load_all(out))


def one(overlay: str, kind: str, name: str) -> Document:
    (found,) = (each for each in rendered(overlay) if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def pods(cluster: Document) -> Iterator[tuple[Document, Document]]:
    """Of each group of a RayCluster the pod's template and its one container."""
    spec = cluster["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        yield pod, container


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_document_is_valid(overlay: str) -> None:
    assert rendered(overlay)
    for document in rendered(overlay):
        require_valid(document)
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "stepwell"


def _set(document: Document, path: str, value: object) -> None:
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    node: Any = document
    for key in parents:
        node = node[key]
    node[last] = value


BROKEN: dict[str, tuple[str, str, str, object, str]] = {
    "unknown field": ("RayCluster", "stepwell", "spec.headGroupSpecs", {}, "headGroupSpecs"),
    "unknown field in a pod": (
        "RayCluster", "stepwell", "spec.workerGroupSpecs.0.template.spec.containers.0.imagePull", "Always", "imagePull"
    ),
    "wrong type": ("RayCluster", "stepwell", "spec.workerGroupSpecs.0.replicas", "two", "replicas"),
    "unknown mode": ("RayCluster", "stepwell", "spec.authOptions.mode", "tokens", "tokens"),
    "number for a string": ("RayCluster", "stepwell", "spec.headGroupSpec.rayStartParams.num-cpus", 0, "num-cpus"),
    "core kind": ("NetworkPolicy", "ray", "spec.podSelectors", {}, "podSelectors"),
    "core kind's type": ("PersistentVolumeClaim", "checkpoints", "spec.accessModes", "ReadWriteMany", "accessModes"),
    "monitor": ("PodMonitor", "ray", "spec.podMetricsEndpoint", [], "podMetricsEndpoint"),
    "version that is not there": ("NetworkPolicy", "ray", "apiVersion", "networking.k8s.io/v2", "NetworkPolicy"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_document_is_refused(case: str) -> None:
    kind, name, path, value, part = BROKEN[case]
    document = copy.deepcopy(one("large", kind, name))
    require_valid(document)
    _set(document, path, value)
    with pytest.raises(InvalidManifestError, match=part):
        require_valid(document)


@pytest.mark.parametrize("overlay", ["small", "large"])
def test_pods_have_memory_for_ray_and_no_more_rights_than_they_need(overlay: str) -> None:
    for pod, container in pods(one(overlay, "RayCluster", "stepwell")):
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        shm = volumes[mounts["/dev/shm"]]["emptyDir"]
        assert shm["medium"] == "Memory"
        limit = container["resources"]["limits"]["memory"]
        assert quantity(shm["sizeLimit"]) <= quantity(limit) / 2, "it counts towards the pod's limit"
        assert volumes[mounts["/checkpoints"]]["persistentVolumeClaim"]["claimName"] == "checkpoints"
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("overlay", ["small", "large"])
def test_cluster_asks_for_its_token_and_runs_the_ray_of_the_image(overlay: str) -> None:
    spec = one(overlay, "RayCluster", "stepwell")["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned
    assert spec["rayVersion"] == pinned[1]


def test_large_has_gpus_and_a_head_that_can_be_replaced() -> None:
    spec = one("large", "RayCluster", "stepwell")["spec"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    (gpu,) = groups["gpu"]["template"]["spec"]["containers"]
    assert (groups["gpu"]["replicas"], gpu["resources"]["limits"]["nvidia.com/gpu"]) == (8, "8")
    assert (gpu["image"], groups["cpu"]["template"]["spec"]["containers"][0]["image"]) == (
        "stepwell:cuda",
        "stepwell:cpu",
    )
    options = spec["gcsFaultToleranceOptions"]
    service = one("large", "Service", "redis")
    assert options["redisAddress"] == f"redis://redis:{service['spec']['ports'][0]['port']}"
    redis = one("large", "StatefulSet", "redis")["spec"]["template"]["spec"]["containers"][0]
    assert options["redisPassword"]["valueFrom"] == redis["env"][0]["valueFrom"]
    assert "gcsFaultToleranceOptions" not in one("small", "RayCluster", "stepwell")["spec"]


@pytest.mark.parametrize("overlay", ["small", "large"])
def test_metrics_are_found_and_let_through(overlay: str) -> None:
    (endpoint,) = one(overlay, "PodMonitor", "ray")["spec"]["podMetricsEndpoints"]
    (number,) = {
        port["containerPort"]
        for _, container in pods(one(overlay, "RayCluster", "stepwell"))
        for port in container["ports"]
        if port["name"] == endpoint["port"]
    }
    ingress = one(overlay, "NetworkPolicy", "ray")["spec"]["ingress"]
    assert number in [port["port"] for rule in ingress for port in rule.get("ports", ())]
    assert one(overlay, "NetworkPolicy", "nothing-else")["spec"]["podSelector"] == {}


@pytest.mark.parametrize("overlay", ["small", "large"])
def test_policies_let_nobody_in_from_anywhere(overlay: str) -> None:
    for policy in (each for each in rendered(overlay) if each["kind"] == "NetworkPolicy"):
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        for rule in policy["spec"].get("ingress", ()):
            assert all(peer.get("podSelector", {}).get("matchLabels") for peer in rule["from"])


def test_job_selects_the_cluster_and_outlives_nothing() -> None:
    spec = one("job", "RayJob", "train-1")["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": one("large", "RayCluster", "stepwell")["metadata"]["name"]}
    assert "rayClusterSpec" not in spec, "a cluster of its own would end with it"
    assert not spec.get("shutdownAfterJobFinishes")
    script = re.search(r"/opt/stepwell/(\S+)", spec["entrypoint"])
    assert script
    assert (ROOT / "deploy" / script[1]).is_file()
    assert "COPY deploy/jobs /opt/stepwell/jobs" in (ROOT / "deploy" / "Dockerfile").read_text()


def test_image_names_are_set_in_one_place(tmp_path: Path) -> None:
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    file = tmp_path / "kuberay" / "large" / "kustomization.yaml"
    file.write_text(file.read_text().replace("newName: stepwell", "newName: registry.example/ml/stepwell"))
    command = ["kubectl", "kustomize", str(file.parent)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    images = set(re.findall(r"image: (\S*stepwell\S*)", out))
    assert images == {"registry.example/ml/stepwell:cpu", "registry.example/ml/stepwell:cuda"}


def quantity(text: str) -> float:
    """Bytes of a quantity of memory."""
    return float(text[:-2]) * {"Mi": 2**20, "Gi": 2**30}[text[-2:]]
