"""The jobs of the manifests: what they run, and what becomes of them when something dies."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import yaml

from jobs import batch_infer
from tests.manifests import (
    OVERLAYS,
    ROOT,
    Object,
    clusters,
    container,
    each_job,
    groups,
    job_of,
    jobs,
    needs_crds,
    needs_kustomize,
    of_kind,
    overlay,
    schemas,
)

pytestmark = [needs_kustomize, pytest.mark.slow]


@each_job
def test_the_entrypoint_is_one_that_the_job_takes(name: str, tmp_path: Path) -> None:
    objects = overlay(name)
    [job] = jobs(objects)
    config = job_of(objects, tmp_path, job)
    assert config.input
    assert config.max_replicas is None or name.startswith("cpu-")  # the cluster bounds it


@each_job
@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 0), (1, 1), (2, 1), (137, 1)])
def test_error_rows_are_no_reason_to_run_a_job_again(
    name: str, code: int, expected: int, tmp_path: Path
) -> None:
    [job] = jobs(overlay(name))
    ran = run_entrypoint(job, tmp_path, f"exit {code}")
    assert ran.returncode == expected


def test_a_night_and_its_retries_write_to_one_folder_and_another_night_to_another(
    tmp_path: Path,
) -> None:
    [job] = jobs(overlay("h200/nightly"))

    def output(cluster: str) -> str:
        ran = run_entrypoint(job, tmp_path, 'echo "$@"', RAY_CLUSTER_NAME=cluster)
        return ran.stdout.split("--output ")[1].split()[0]

    assert output("phi4ray-nightly-29000001-abcde") == output("phi4ray-nightly-29000001-x2z4w")
    assert output("phi4ray-nightly-29000001-abcde") != output("phi4ray-nightly-29001441-abcde")
    assert output("n-1-abcde") == "s3://bucket/nightly/n-1/"


def run_entrypoint(
    job: Object, folder: Path, script: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run it as Ray does, by a shell, with the pod's environment and another `python`."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    head = container(job["rayClusterSpec"]["headGroupSpec"])
    env = {one["name"]: one["value"] for one in head["env"]}
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        job["entrypoint"], shell=True, capture_output=True, text=True,
        env={**env, "PATH": path, **environment},
    )  # fmt: skip


@each_job
def test_a_failed_job_is_tried_again_and_leaves_no_cluster_behind(name: str) -> None:
    [job] = jobs(overlay(name))
    assert job["backoffLimit"] >= 3
    assert job["submitterConfig"]["backoffLimit"] >= 3
    assert job["submissionMode"] == "K8sJobMode"  # whose submitter goes on after a lost head
    assert job["shutdownAfterJobFinishes"] is True
    assert "activeDeadlineSeconds" not in job  # after which KubeRay does not try again
    assert "clusterSelector" not in job


@each_job
def test_the_submitter_has_the_image_of_the_cluster(name: str) -> None:
    [job] = jobs(overlay(name))
    [submitter] = job["submitterPodTemplate"]["spec"]["containers"]
    assert submitter["image"] == container(job["rayClusterSpec"]["headGroupSpec"])["image"]
    assert "command" not in submitter  # KubeRay puts the submission there


def documented() -> Object:
    """The RayJob that docs/operations.md has for a fleet."""
    text = (ROOT / "docs" / "operations.md").read_text()
    [job] = re.findall(r"^```yaml\n(apiVersion: .*?)^```$", text, re.DOTALL | re.MULTILINE)
    found: Object = yaml.safe_load(job)
    return found


@needs_crds
def test_the_documented_job_for_a_fleet_has_only_fields_that_kuberay_knows() -> None:
    schemas()["RayJob"].validate(documented())


def test_the_documented_job_for_a_fleet_is_submitted_by_the_operator_who_may_reach_it() -> None:
    [fleet] = of_kind(overlay("h200/fleet"), "RayCluster")
    [policy] = of_kind(overlay("h200/fleet"), "NetworkPolicy")
    job = documented()
    assert job["metadata"]["namespace"] == fleet["metadata"]["namespace"]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": fleet["metadata"]["name"]}
    dashboard = [
        sources["from"]
        for sources in policy["spec"]["ingress"]
        if 8265 in [port["port"] for port in sources.get("ports", ())]
    ]
    operator = {"kubernetes.io/metadata.name": "kuberay-operator"}
    assert dashboard == [[{"namespaceSelector": {"matchLabels": operator}}]]
    assert job["spec"]["submissionMode"] == "HTTPMode"


def test_the_documented_job_for_a_fleet_is_one_that_the_job_takes() -> None:
    command = documented()["spec"]["entrypoint"].removesuffix(" || test $? -eq 3")
    python, _, module, *arguments = shlex.split(command)
    assert (python, module) == ("python", "jobs.batch_infer")
    batch_infer.configuration(batch_infer.parser().parse_args(arguments))


def test_the_schedule_is_in_a_time_zone_that_there_is() -> None:
    [cron] = of_kind(overlay("h200/nightly"), "RayCronJob")
    assert ZoneInfo(cron["spec"]["timeZone"])
    assert len(cron["spec"]["schedule"].split()) == 5


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name.startswith("spot/")])
def test_spot_workers_are_asked_for_first_and_the_head_is_never_one(name: str) -> None:
    [cluster] = clusters(overlay(name))
    head, workers, spot = groups(cluster)
    assert [group["groupName"] for group in (workers, spot)] == ["workers", "spot"]
    assert spot["priority"] > workers.get("priority", 0)
    wanted = [affinity(group) for group in (head, workers, spot)]
    label, value = "karpenter.sh/capacity-type", ["spot"]
    assert [one["operator"] for one in wanted] == ["NotIn", "NotIn", "In"]
    assert all((one["key"], one["values"]) == (label, value) for one in wanted)
    assert spot["template"]["spec"]["terminationGracePeriodSeconds"] <= 120


def affinity(group: Object) -> Object:
    node = group["template"]["spec"]["affinity"]["nodeAffinity"]
    required = node["requiredDuringSchedulingIgnoredDuringExecution"]
    [term] = required["nodeSelectorTerms"]
    [expression] = term["matchExpressions"]
    found: Object = expression
    return found
