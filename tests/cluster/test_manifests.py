"""Dry runs of the manifests: what they say is run as they say it, on pods of this machine."""

import copy
import io
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import yaml

from phi4ray.storage import join, s3, storage_for, upload_tree
from phi4ray.train.tiny import make_tiny_model
from tests.manifests import (
    ROOT,
    Object,
    container,
    groups,
    jobs,
    needs_kustomize,
    of_kind,
    with_values,
)
from tests.pods import DASHBOARD, HEAD, TOKEN, WORKER, Cluster, build_image, needs_namespaces
from tests.waiting import until

pytestmark = [pytest.mark.cluster, needs_kustomize, needs_namespaces, pytest.mark.timeout(1200)]

DOCUMENTED = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
"""What docs/operations.md tells to put into the Secret phi4ray-object-store."""


@dataclass(frozen=True)
class Applied:
    """A RayJob and a RayService on one cluster; the job's data is under `prefix`."""

    cluster: Cluster
    job: Object
    service: Object
    prefix: str


@pytest.fixture(scope="module")
def applied(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Applied]:
    """The pods of the RayService, with the file of the RayJob's settings.

    To start, the job's pods have the same commands in the same environments and no other files.
    """
    folder = tmp_path_factory.mktemp("manifests")
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    httpx.put(f"{s3_endpoint}/{bucket}").raise_for_status()
    prefix = f"s3://{bucket}/folder/"
    settings = {
        "input": [join(prefix, "prompts/")],
        "output": join(prefix, "answers/"),
        "engine": {"model": join(prefix, "tiny-phi-4")},
    }
    values = {"s3Endpoint": s3_endpoint, "job.yaml": yaml.safe_dump(settings)}
    found = {}
    for name in ("batch", "service"):
        (folder / name).mkdir()
        found[name] = with_values(folder / name, f"cpu-tiny/{name}", **values)
    [job], [service] = jobs(found["batch"]), of_kind(found["service"], "RayService")
    spec = copy.deepcopy(service["spec"]["rayClusterConfig"])
    for mine, its in zip(groups(spec), groups(job["rayClusterSpec"]), strict=True):
        assert mine["rayStartParams"] == its["rayStartParams"]
        ours, theirs = container(mine), container(its)
        for same in ("image", "env", "envFrom", "resources", "livenessProbe"):
            assert ours[same] == theirs[same]
        added = [mount for mount in theirs["volumeMounts"] if mount not in ours["volumeMounts"]]
        assert [mount["name"] for mount in added] == ["job"]
        ours["volumeMounts"] += added
        mine["template"]["spec"]["volumes"] += [
            volume for volume in its["template"]["spec"]["volumes"] if volume["name"] == "job"
        ]
    secrets = {"phi4ray-object-store": DOCUMENTED}
    image = build_image(folder / "image")
    cluster = Cluster(image, folder / "pods", found["batch"], spec, secrets)
    with cluster.running():
        yield Applied(cluster, job, service, prefix)


@pytest.fixture
def prefix(applied: Applied, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The folder of the job's data, to which the AWS variables lead from here too."""
    for name, value in {**DOCUMENTED, "AWS_ENDPOINT_URL": s3_endpoint}.items():
        monkeypatch.setenv(name, value)
    s3._client.cache_clear()
    yield applied.prefix
    s3._client.cache_clear()


def parts(prefix: str) -> dict[str, bytes]:
    store = storage_for(prefix)
    uris = [item.uri for item in store.list(prefix) if item.uri.endswith(".parquet")]
    return {uri: store.read(uri) for uri in uris}


def rows(found: dict[str, bytes]) -> list[dict[str, Any]]:
    return [row for data in found.values() for row in pq.read_table(io.BytesIO(data)).to_pylist()]


def test_the_job_of_a_rayjob_answers_all_rows_and_a_retry_of_it_none_again(
    applied: Applied, prefix: str, tmp_path: Path
) -> None:
    cluster, job = applied.cluster, applied.job
    prompts, answers = join(prefix, "prompts/"), join(prefix, "answers/")
    for path in (ROOT / "examples").glob("*.jsonl"):
        storage_for(prompts).write(join(prompts, path.name), path.read_bytes())
    upload_tree(make_tiny_model(tmp_path / "tiny"), join(prefix, "tiny-phi-4"))
    pods = cluster.head, cluster.worker
    for pod, group in zip(pods, groups(job["rayClusterSpec"]), strict=True):
        until(partial(pod.passes, "readinessProbe", group), 60, pod.log)
    code, said = cluster.submit("first", job["entrypoint"])
    assert code == 0, said
    done = parts(answers)
    found = rows(done)
    assert len(found) == 10
    # An error row is no reason to try again: the job has ended well.
    assert [row["error_code"] for row in found if row["error_code"]] == ["empty_messages"]
    # On the head, where a Ray job would run it.
    code, said = cluster.head.run("bash", "-c", job["entrypoint"], timeout_s=600)
    assert code == 0, said
    assert "in 1 parts, 1 of them done" in said
    assert parts(answers) == done


@pytest.mark.engine
def test_the_application_of_a_rayservice_answers_a_chat(applied: Applied) -> None:
    cluster, service = applied.cluster, applied.service
    spec = service["spec"]["rayClusterConfig"]
    dashboard = httpx.Client(
        base_url=DASHBOARD, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60
    )
    deployed = yaml.safe_load(service["spec"]["serveConfigV2"])
    with dashboard:

        def status() -> str:
            found = dashboard.get("/api/serve/applications/").raise_for_status().json()
            state = str(found["applications"].get("phi4", {}).get("status", "none yet"))
            assert state != "DEPLOY_FAILED", found
            return state

        # A worker without a replica gets no requests, and is not restarted for it.
        assert not cluster.worker.passes("readinessProbe")
        assert cluster.worker.passes("livenessProbe")
        # As KubeRay deploys it.
        dashboard.put("/api/serve/applications/", json=deployed).raise_for_status()
        until(lambda: status() == "RUNNING", 240, cluster.worker.log)
        until(lambda: cluster.worker.passes("readinessProbe"), 30, cluster.worker.log)
        body = {
            "model": "microsoft/phi-4", "max_tokens": 8,
            "messages": [{"role": "user", "content": "Hello"}],
        }  # fmt: skip
        for ip in (HEAD, WORKER):
            with httpx.Client(base_url=f"http://{ip}:8000", timeout=60) as client:
                assert client.get("/health").status_code == 200
                assert client.get("/ready").status_code == 200
                answer = client.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
                assert 1 <= answer.json()["usage"]["completion_tokens"] <= 8
        # When the pod is to go, its preStop hook tells Ray, and waits for the replica and HAProxy.
        hook = container(spec["workerGroupSpecs"][0])["lifecycle"]["preStop"]["exec"]["command"]
        shell, flag, script = hook
        code, said = cluster.worker.run(shell, flag, script.partition("; while")[0])
        assert code == 0, said
        [waited_for] = re.findall(r"while pgrep -f ('[^']+')", script)
        code, said = cluster.worker.run(shell, flag, f"pgrep -af {waited_for}")
        assert "ServeReplica:phi4:replica" in said, said
        assert "HAProxyManager" in said, said
