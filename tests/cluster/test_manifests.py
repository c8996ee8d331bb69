"""Dry runs of the manifests: what they say is run as they say it, on pods of this machine."""

import io
import re
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import yaml

from phi4ray.storage import join, storage_for, upload_tree
from phi4ray.train.tiny import make_tiny_model
from tests.manifests import (
    ROOT,
    clusters,
    container,
    jobs,
    needs_kustomize,
    of_kind,
    overlay,
    with_values,
)
from tests.pods import DASHBOARD, HEAD, TOKEN, WORKER, Cluster, build_image, needs_namespaces
from tests.waiting import until

pytestmark = [pytest.mark.cluster, needs_kustomize, needs_namespaces, pytest.mark.timeout(1200)]

DOCUMENTED = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
"""What docs/operations.md tells to put into the Secret phi4ray-object-store."""


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield build_image(Path(folder))


def parts(prefix: str) -> dict[str, bytes]:
    store = storage_for(prefix)
    uris = [item.uri for item in store.list(prefix) if item.uri.endswith(".parquet")]
    return {uri: store.read(uri) for uri in uris}


def rows(found: dict[str, bytes]) -> list[dict[str, Any]]:
    return [row for data in found.values() for row in pq.read_table(io.BytesIO(data)).to_pylist()]


def test_the_job_of_a_rayjob_answers_all_rows_and_a_retry_of_it_none_again(
    image: Path, s3_prefix: str, s3_endpoint: str, tmp_path: Path
) -> None:
    prompts, answers = join(s3_prefix, "prompts/"), join(s3_prefix, "answers/")
    for path in (ROOT / "examples").glob("*.jsonl"):
        storage_for(prompts).write(join(prompts, path.name), path.read_bytes())
    model = join(s3_prefix, "tiny-phi-4")
    upload_tree(make_tiny_model(tmp_path / "tiny"), model)
    settings = {"input": [prompts], "output": answers, "engine": {"model": model}}
    objects = with_values(
        tmp_path, "cpu-tiny/batch", s3Endpoint=s3_endpoint, **{"job.yaml": yaml.safe_dump(settings)}
    )
    [job] = jobs(objects)
    secrets = {"phi4ray-object-store": DOCUMENTED}
    cluster = Cluster(image, tmp_path / "pods", objects, job["rayClusterSpec"], secrets)
    with cluster.running():
        for pod in (cluster.head, cluster.worker):
            until(partial(pod.passes, "readinessProbe"), 60, pod.log)
        code, said = cluster.submit("first", job["entrypoint"])
        assert code == 0, said
        done = parts(answers)
        found = rows(done)
        assert len(found) == 10
        # An error row is no reason to try again: the job has ended well.
        assert [row["error_code"] for row in found if row["error_code"]] == ["empty_messages"]
        code, said = cluster.submit("retry", job["entrypoint"])
        assert code == 0, said
        assert "in 1 parts, 1 of them done" in said
        assert parts(answers) == done


@pytest.mark.engine
def test_the_application_of_a_rayservice_answers_a_chat(image: Path, tmp_path: Path) -> None:
    objects = overlay("cpu-tiny/service")
    [service] = of_kind(objects, "RayService")
    [spec] = clusters(objects)
    cluster = Cluster(image, tmp_path / "pods", objects, spec, {})
    dashboard = httpx.Client(
        base_url=DASHBOARD, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60
    )
    deployed = yaml.safe_load(service["spec"]["serveConfigV2"])
    with cluster.running(), dashboard:

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
