"""The service of the manifests: what it serves, how it drains, who reaches it."""

import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from phi4ray.serve.tenants import parse
from tests.manifests import (
    K8S,
    KUBERNETES,
    Object,
    clusters,
    container,
    each_overlay,
    each_service,
    groups,
    jobs,
    needs_kustomize,
    of_kind,
    overlay,
    service_of,
)

START_S = 600
"""A replica's start on a node that the cloud brings: node, image, weights, engine."""

pytestmark = [needs_kustomize, pytest.mark.slow]


@each_service
def test_the_serve_config_is_one_that_ray_serve_and_the_application_take(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    service, config = service_of(overlay(name))
    deployed = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    [application] = deployed.applications
    assert application.import_path == "cluster.serve:app"
    assert deployed.http_options.host == "0.0.0.0"  # else no other pod would reach it
    assert config.engine.model_name


@each_service
def test_all_name_the_same_serve_port(name: str) -> None:
    objects = overlay(name)
    service, _ = service_of(objects)
    port = yaml.safe_load(service["spec"]["serveConfigV2"])["http_options"]["port"]
    for group in groups(service["spec"]["rayClusterConfig"]):
        assert {"name": "serve", "containerPort": port} in container(group)["ports"]
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        assert container(group)["readinessProbe"]["httpGet"]["port"] == "serve"
    [policy] = of_kind(objects, "NetworkPolicy")
    assert policy["spec"]["ingress"][1]["ports"] == [{"protocol": "TCP", "port": port}]


@each_service
def test_leaving_replicas_have_the_time_that_draining_takes(name: str) -> None:
    service, config = service_of(overlay(name))
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > config.drain_timeout_s
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        if group["groupName"] != "spot":
            # Serve stops a replica this long before the deadline, replaced or not.
            assert deadline_s(group) - config.drain_timeout_s >= START_S


@each_overlay
def test_a_pod_that_goes_drains_its_node_before_its_time_is_over(name: str) -> None:
    for cluster in clusters(overlay(name)):
        for group in cluster["workerGroupSpecs"]:
            grace_s = group["template"]["spec"]["terminationGracePeriodSeconds"]
            shell, flag, script = pre_stop(group)
            assert (shell, flag) == ("bash", "-c")
            assert 0 < grace_s - deadline_s(group) <= 30
            assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0


@each_overlay
def test_a_pod_stays_for_its_work_and_for_the_streams_that_pass_through_it(name: str) -> None:
    for cluster in clusters(overlay(name)):
        for group in cluster["workerGroupSpecs"]:
            [pattern] = re.findall(r"while pgrep -f '([^']+)'", pre_stop(group)[2])
            for process in (
                "ServeReplica:phi4:replica",
                "MapWorker(ShardWorker)",
                "HAProxyManager",
            ):
                assert re.match(pattern, f"ray::{process}")
            # It stays longer than the pod's grace, for those who ask it until then.
            assert not re.match(pattern, "ray::ServeReplica:phi4:router")


def pre_stop(group: Object) -> list[str]:
    command: list[str] = container(group)["lifecycle"]["preStop"]["exec"]["command"]
    return command


def deadline_s(group: Object) -> int:
    drain = pre_stop(group)[2].partition(";")[0]
    return int(drain.split("--deadline-remaining-seconds ")[1])


def test_keys_are_read_where_the_secret_is_mounted() -> None:
    service, config = service_of(overlay("h200/service"))
    assert config.gate.keys_file is not None
    folder = str(Path(config.gate.keys_file).parent)
    for group in groups(service["spec"]["rayClusterConfig"]):
        mounts = {one["mountPath"]: one["name"] for one in container(group)["volumeMounts"]}
        volumes = {one["name"]: one for one in group["template"]["spec"]["volumes"]}
        assert volumes[mounts[folder]]["secret"]["secretName"] == "phi4ray-keys"


def test_the_example_of_a_secret_is_what_the_gate_reads_and_lets_nobody_in() -> None:
    [secret] = yaml.safe_load_all((K8S / "examples" / "keys.yaml").read_text())
    kubernetes_validate.validate(secret, KUBERNETES, strict=True)
    assert secret["metadata"]["name"] == "phi4ray-keys"
    tenants = parse(secret["stringData"]["keys.yaml"], "keys.yaml").tenants
    assert tenants
    assert all(tenant.disabled for tenant in tenants)


@each_overlay
def test_only_the_serve_port_is_ever_on_an_ingress(name: str) -> None:
    objects = overlay(name)
    assert not of_kind(objects, "Service")
    for cluster in clusters(objects):
        assert not cluster["headGroupSpec"].get("enableIngress")
        assert "serviceType" not in cluster["headGroupSpec"]
    for ingress in of_kind(objects, "Ingress"):
        [service] = of_kind(objects, "RayService")
        assert ingress["metadata"]["namespace"] == service["metadata"]["namespace"]
        assert ingress["spec"]["tls"]
        for rule in ingress["spec"]["rules"]:
            assert rule["host"] in ingress["spec"]["tls"][0]["hosts"]
            [path] = rule["http"]["paths"]
            assert path["path"] == "/v1"
            assert path["backend"]["service"] == {
                "name": f"{service['metadata']['name']}-serve-svc", "port": {"number": 8000},
            }  # fmt: skip


@each_overlay
def test_rays_own_ports_are_open_to_its_pods_and_the_operator_alone(name: str) -> None:
    objects = overlay(name)
    [policy] = of_kind(objects, "NetworkPolicy")
    labels = policy["spec"]["podSelector"]["matchLabels"]
    own, *others = policy["spec"]["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": labels}}]}
    for rule in others:
        ports = {port["port"] for port in rule["ports"]}
        [source] = rule["from"]
        [namespace] = source["namespaceSelector"]["matchLabels"].values()
        if namespace != "kuberay-operator":
            assert not ports & {6379, 8265, 10001, 52365}
    pods = [group["template"] for cluster in clusters(objects) for group in groups(cluster)]
    pods += [job["submitterPodTemplate"] for job in jobs(objects)]
    for pod in pods:
        assert labels.items() <= pod["metadata"]["labels"].items()


@each_overlay
def test_the_labels_by_which_kuberay_finds_its_pods_are_left_to_it(name: str) -> None:
    # The Service that a RayService has for its head selects KubeRay's own values of them.
    for cluster in clusters(overlay(name)):
        for group in groups(cluster):
            labels = group["template"]["metadata"]["labels"]
            assert not {"app.kubernetes.io/name", "app.kubernetes.io/created-by"} & set(labels)
            assert not [label for label in labels if label.startswith("ray.io/")]


@each_overlay
def test_disruption_budgets_are_of_pods_that_are_there_and_of_a_kind_that_works(name: str) -> None:
    objects = overlay(name)
    budgets = of_kind(objects, "PodDisruptionBudget")
    assert budgets
    for budget in budgets:
        # Pods without a scale subresource: Kubernetes counts only an absolute minAvailable.
        assert isinstance(budget["spec"]["minAvailable"], int)
        labels = dict(budget["spec"]["selector"]["matchLabels"])
        assert labels.pop("ray.io/node-type") in ("head", "worker")  # which KubeRay adds
        for cluster in clusters(objects):
            for group in groups(cluster):
                assert labels.items() <= group["template"]["metadata"]["labels"].items()
