"""What an operator applies: overlays as kustomize renders them, and the schemas they must meet."""

import functools
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs import batch_infer
from phi4ray.config import BatchConfig, EngineConfig
from phi4ray.serve.config import ServeConfig, serve_config

ROOT = Path(__file__).parents[1]
K8S = ROOT / "k8s"
OVERLAYS = sorted(
    path.parent.relative_to(K8S / "overlays").as_posix()
    for path in (K8S / "overlays").rglob("kustomization.yaml")
)
CRDS = Path(os.environ.get("PHI4RAY_KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay-crds"))

KUBERNETES = "1.34"
RAY_KINDS = {"RayCluster", "RayService", "RayJob", "RayCronJob"}
SERVING_OVERLAYS = [name for name in OVERLAYS if name.endswith("/service")]
JOB_OVERLAYS = [name for name in OVERLAYS if name.endswith(("/batch", "/nightly"))]

each_overlay = pytest.mark.parametrize("name", OVERLAYS)
each_service = pytest.mark.parametrize("name", SERVING_OVERLAYS)
each_job = pytest.mark.parametrize("name", JOB_OVERLAYS)

Object = dict[str, Any]


def kustomize() -> list[str] | None:
    """The command that renders a folder: kustomize itself, or the one that kubectl has."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    return ["kubectl", "kustomize"] if shutil.which("kubectl") else None


needs_kustomize = pytest.mark.skipif(
    kustomize() is None, reason="neither kustomize nor kubectl is here"
)
needs_crds = pytest.mark.skipif(not CRDS.is_dir(), reason="KubeRay's CRDs are not here")


@functools.cache
def render(folder: Path) -> list[Object]:
    """The objects of a kustomization; not to be changed, because others see them too."""
    command = kustomize()
    assert command
    result = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return list(yaml.load_all(result.stdout, yaml.CSafeLoader))


def overlay(name: str) -> list[Object]:
    return render(K8S / "overlays" / name)


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [item for item in objects if item["kind"] == kind]


def clusters(objects: list[Object]) -> Iterator[Object]:
    """The spec of each Ray cluster, wherever it is embedded."""
    for item in objects:
        match item["kind"]:
            case "RayCluster":
                yield item["spec"]
            case "RayService":
                yield item["spec"]["rayClusterConfig"]
            case "RayJob":
                yield item["spec"]["rayClusterSpec"]
            case "RayCronJob":
                yield item["spec"]["jobTemplate"]["rayClusterSpec"]


def jobs(objects: list[Object]) -> Iterator[Object]:
    """The spec of each job, at once or by the clock."""
    for item in objects:
        if item["kind"] == "RayJob":
            yield item["spec"]
        elif item["kind"] == "RayCronJob":
            yield item["spec"]["jobTemplate"]


def groups(cluster: Object) -> list[Object]:
    """Head and worker groups."""
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def container(group: Object) -> Object:
    """Ray's container of a group, the first one and here the only one."""
    containers: list[Object] = group["template"]["spec"]["containers"]
    assert len(containers) == 1
    return containers[0]


@functools.cache
def schemas() -> dict[str, jsonschema.Draft202012Validator]:
    """KubeRay's schemas by kind, closed: a field that they do not name is an error."""
    found = {}
    for path in sorted(CRDS.glob("ray.io_*.yaml")):
        spec = yaml.load(path.read_text("utf-8"), yaml.CSafeLoader)["spec"]
        version = next(one for one in spec["versions"] if one["name"] == "v1")
        schema = closed(version["schema"]["openAPIV3Schema"])
        found[spec["names"]["kind"]] = jsonschema.Draft202012Validator(schema)
    return found


def closed(schema: Any) -> Any:
    """The schema without room for fields that it does not name, as API servers prune them."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        kept = schema.get("x-kubernetes-preserve-unknown-fields")
        result.setdefault("additionalProperties", bool(kept))
    return result


def quantity(text: str | int) -> float:
    """A Kubernetes quantity as a number: `500m`, `16Gi`, `2`."""
    units = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "k": 1e3, "M": 1e6, "G": 1e9}
    digits = str(text).rstrip("".join(units))
    unit = str(text)[len(digits) :]
    return float(digits) * units.get(unit, 1)


def composed(folder: Path, *components: str, name: str = "h200/service") -> list[Object]:
    """An overlay with further components before the wiring."""
    hardware, workload = name.split("/")
    parts = [f"hardware/{hardware}", f"workloads/{workload}", *components, "wiring"]
    text = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(K8S / "base", folder)],
        "components": [
            part if (folder / part).is_dir() else os.path.relpath(K8S / part, folder)
            for part in parts
        ],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(text))
    return render(folder)


def with_values(folder: Path, name: str, **values: str) -> list[Object]:
    """An overlay as an operator has it who keeps values of their own in a folder."""
    mine = folder / "mine"
    mine.mkdir()
    patch = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "values"}, "data": values,
    }  # fmt: skip
    component = {
        "apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component",
        "patches": [{"path": "values.yaml"}],
    }  # fmt: skip
    (mine / "values.yaml").write_text(yaml.safe_dump(patch))
    (mine / "kustomization.yaml").write_text(yaml.safe_dump(component))
    return composed(folder, "mine", name=name)


def service_of(objects: list[Object]) -> tuple[Object, ServeConfig]:
    """The RayService and what its application is configured with."""
    service = of_kind(objects, "RayService")[0]
    [application] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    return service, serve_config(application["args"])


def job_of(objects: list[Object], folder: Path, job: Object) -> BatchConfig:
    """What the entrypoint's own parser makes of it, with the file that the pods would have."""
    shell, flag, script = shlex.split(job["entrypoint"])
    assert (shell, flag) == ("bash", "-c")
    command = script.partition("||")[0]
    python, _, module, *arguments = shlex.split(command)
    assert (python, module) == ("python", "jobs.batch_infer")
    at = arguments.index("--config") + 1
    path = Path(arguments[at])
    [mount] = [
        mount
        for mount in container(job["rayClusterSpec"]["headGroupSpec"])["volumeMounts"]
        if mount["mountPath"] == str(path.parent)
    ]
    volumes = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    [volume] = [volume for volume in volumes if volume["name"] == mount["name"]]
    [settings] = [
        item
        for item in of_kind(objects, "ConfigMap")
        if item["metadata"]["name"] == volume["configMap"]["name"]
    ]
    arguments[at] = str(folder / path.name)
    (folder / path.name).write_text(settings["data"][path.name])
    return batch_infer.configuration(batch_infer.parser().parse_args(arguments))


def engine_of(name: str, folder: Path) -> EngineConfig:
    objects = overlay(name)
    for job in jobs(objects):
        return job_of(objects, folder, job).engine
    if of_kind(objects, "RayService"):
        return service_of(objects)[1].engine
    return serve_config({"recipe": "phi4-fp8-h200"}).engine  # a fleet is for any
