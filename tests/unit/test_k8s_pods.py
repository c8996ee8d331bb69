"""Pods of the manifests: alike, safe, and as large as the memory planner says."""

import math
from pathlib import Path

import pytest
import yaml

from cluster.environment import SERVING
from phi4ray.gpus import GIB
from phi4ray.memory import place_engine, plan_memory
from tests.manifests import (
    OVERLAYS,
    SERVING_OVERLAYS,
    Object,
    clusters,
    container,
    each_overlay,
    engine_of,
    groups,
    needs_kustomize,
    of_kind,
    overlay,
    quantity,
    service_of,
)

pytestmark = [needs_kustomize, pytest.mark.slow]

GPU_OVERLAYS = [name for name in OVERLAYS if not name.startswith("cpu-")]
# The GPU operator's label of a node, and the card of `phi4ray.gpus` that it stands for.
CARDS = {"NVIDIA-H200": "h200", "NVIDIA-H100-80GB-HBM3": "h100-80", "NVIDIA-L4": "l4-24"}


@each_overlay
def test_head_and_workers_have_one_image_and_one_environment(name: str) -> None:
    for cluster in clusters(overlay(name)):
        head, *workers = map(container, groups(cluster))
        assert workers
        for worker in workers:
            for key in ("image", "env", "envFrom", "securityContext", "volumeMounts"):
                assert worker[key] == head[key], key


@each_overlay
def test_every_container_has_the_environment_that_serving_needs(name: str) -> None:
    for cluster in clusters(overlay(name)):
        for group in groups(cluster):
            env = {one["name"]: one["value"] for one in container(group)["env"]}
            assert SERVING.items() <= env.items()


@each_overlay
def test_caches_are_on_a_volume(name: str) -> None:
    for cluster in clusters(overlay(name)):
        for group in groups(cluster):
            mounts = {one["name"]: one["mountPath"] for one in container(group)["volumeMounts"]}
            volumes = {one["name"] for one in group["template"]["spec"]["volumes"]}
            assert set(mounts) == volumes
            env = {one["name"]: one["value"] for one in container(group)["env"]}
            for variable in ("HF_HOME", "VLLM_CACHE_ROOT", "PHI4RAY_MODEL_CACHE"):
                assert env[variable].startswith(f"{mounts['cache']}/")


@each_overlay
def test_pods_have_no_privileges_and_workers_no_rights_in_kubernetes(name: str) -> None:
    objects = overlay(name)
    for cluster in clusters(objects):
        assert cluster["authOptions"] == {"mode": "token"}
        for group in groups(cluster):
            pod, ray = group["template"]["spec"], container(group)
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert ray["securityContext"]["allowPrivilegeEscalation"] is False
            assert ray["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for group in cluster["workerGroupSpecs"]:
            assert group["template"]["spec"]["automountServiceAccountToken"] is False
    for account in of_kind(objects, "ServiceAccount"):
        # Of identities, S3's client knows what AWS makes of this one.
        assert set(account["metadata"]["annotations"]) == {"eks.amazonaws.com/role-arn"}


@each_overlay
def test_the_head_takes_no_work_and_the_cluster_scales_from_nothing(name: str) -> None:
    for cluster in clusters(overlay(name)):
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["autoscalerOptions"]["version"] == "v2"
        for group in cluster["workerGroupSpecs"]:
            assert (group["replicas"], group["minReplicas"]) == (0, 0)


@pytest.mark.parametrize("name", GPU_OVERLAYS)
def test_a_pod_has_the_gpus_of_its_replicas_on_the_card_of_the_recipe(
    name: str, tmp_path: Path
) -> None:
    engine = engine_of(name, tmp_path)
    for cluster in clusters(overlay(name)):
        for group in cluster["workerGroupSpecs"]:
            limits = container(group)["resources"]["limits"]
            assert int(limits["nvidia.com/gpu"]) == engine.tensor_parallel_size
            assert int(limits["cpu"]) >= engine.num_cpus
            card = CARDS[group["template"]["spec"]["nodeSelector"]["nvidia.com/gpu.product"]]
            assert plan_memory(place_engine(engine, card)).fits
            assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in (
                group["template"]["spec"]["tolerations"]
            )


@pytest.mark.parametrize("name", SERVING_OVERLAYS)
def test_every_group_can_hold_all_replicas_and_those_that_an_upgrade_adds(name: str) -> None:
    service, config = service_of(overlay(name))
    [application] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    deployments = {one["name"]: one for one in application.get("deployments", ())}
    surge_percent = deployments.get("replica", {}).get("max_surge_percent", 0)
    replicas = config.autoscaling.widest[1]
    replicas += math.ceil(replicas * surge_percent / 100)
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        gpus = int(container(group)["resources"]["limits"].get("nvidia.com/gpu", 1))
        assert group["maxReplicas"] * gpus == replicas * (config.engine.gpus_per_replica or 1)


@pytest.mark.parametrize("name", GPU_OVERLAYS)
def test_host_memory_holds_the_weights_while_they_load(name: str, tmp_path: Path) -> None:
    engine = engine_of(name, tmp_path)
    for cluster in clusters(overlay(name)):
        for group in cluster["workerGroupSpecs"]:
            limits = container(group)["resources"]["limits"]
            card = CARDS[group["template"]["spec"]["nodeSelector"]["nvidia.com/gpu.product"]]
            # FP8 is made on the GPU of the bf16 weights that are read.
            stored = engine.model_copy(update={"quantization": None, "max_model_len": 256})
            plan = place_engine(stored, card)
            weights = plan_memory(plan).weight_bytes * engine.tensor_parallel_size
            assert quantity(limits["memory"]) >= weights + shared_memory(group) + 4 * GIB


@each_overlay
def test_shared_memory_holds_the_object_store_and_the_engine(name: str, tmp_path: Path) -> None:
    engine = engine_of(name, tmp_path)
    for cluster in clusters(overlay(name)):
        for group in groups(cluster):
            mounts = {one["name"]: one["mountPath"] for one in container(group)["volumeMounts"]}
            assert mounts["shm"] == "/dev/shm"
            store = int(group["rayStartParams"]["object-store-memory"])
            ranks = engine.tensor_parallel_size if "groupName" in group else 0
            assert shared_memory(group) >= store + 2 * GIB * ranks
            resources = container(group)["resources"]
            assert resources["requests"]["memory"] == resources["limits"]["memory"]


def shared_memory(group: Object) -> float:
    [shm] = [one for one in group["template"]["spec"]["volumes"] if one["name"] == "shm"]
    assert shm["emptyDir"]["medium"] == "Memory"
    return quantity(shm["emptyDir"]["sizeLimit"])
