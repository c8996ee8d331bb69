"""The manifests are valid, complete, and of one version."""

import copy
import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.manifests import (
    K8S,
    KUBERNETES,
    OVERLAYS,
    RAY_KINDS,
    ROOT,
    Object,
    clusters,
    composed,
    container,
    each_overlay,
    groups,
    needs_crds,
    needs_kustomize,
    of_kind,
    overlay,
    schemas,
    with_values,
)

pytestmark = [needs_kustomize, pytest.mark.slow]

# Options that no overlay takes, because they need more than a cluster with GPUs.
OTHER_OPTIONS = ("node-cache", "gcs-fault-tolerance", "incremental-upgrade")


def check_custom(item: Object) -> None:
    errors = sorted(schemas()[item["kind"]].iter_errors(item), key=str)
    assert not [f"{error.json_path}: {error.message[:200]}" for error in errors]


@needs_crds
@each_overlay
def test_every_custom_resource_has_only_fields_that_kuberay_knows(name: str) -> None:
    found = [item for item in overlay(name) if item["kind"] in RAY_KINDS]
    assert len(found) == 1
    for item in found:
        check_custom(item)


@each_overlay
def test_every_other_resource_is_strictly_valid(name: str) -> None:
    core = [item for item in overlay(name) if item["kind"] not in RAY_KINDS]
    assert {"Namespace", "ServiceAccount", "NetworkPolicy"} <= {item["kind"] for item in core}
    for item in core:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)


@each_overlay
def test_every_pod_is_strictly_valid(name: str) -> None:
    for cluster in clusters(overlay(name)):
        for group in groups(cluster):
            pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(group["template"])}
            pod["metadata"]["name"] = "pod"
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@needs_crds
@pytest.mark.parametrize("path", ["rayClusterConfig.rayVersoin", "upgradeStrategy.typ"])
def test_a_misspelt_field_is_found(path: str) -> None:
    service = copy.deepcopy(of_kind(overlay("h200/service"), "RayService")[0])
    parent, _, field = path.partition(".")
    service["spec"][parent][field] = "x"
    assert [error.message for error in schemas()["RayService"].iter_errors(service)]
    service["spec"][parent].pop(field)
    container(service["spec"]["rayClusterConfig"]["headGroupSpec"])["imagePullPolcy"] = "Always"
    assert [error.message for error in schemas()["RayService"].iter_errors(service)]


@needs_crds
@pytest.mark.parametrize("option", OTHER_OPTIONS)
def test_options_that_no_overlay_takes_are_valid_too(option: str, tmp_path: Path) -> None:
    objects = composed(tmp_path, f"options/{option}")
    assert objects != overlay("h200/service")
    for item in objects:
        if item["kind"] in RAY_KINDS:
            check_custom(item)
        else:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)


def test_every_option_and_every_hardware_is_used_or_listed_here() -> None:
    texts = [path.read_text() for path in (K8S / "overlays").rglob("kustomization.yaml")]
    for room in ("options", "hardware", "workloads"):
        for folder in (K8S / room).iterdir():
            part = f"{room}/{folder.name}\n"
            used = any(part in text for text in texts)
            shared = any(
                f"../{folder.name}\n" in path.read_text()
                for path in (K8S / room).rglob("kustomization.yaml")
            )
            assert used or shared or folder.name in OTHER_OPTIONS


@each_overlay
def test_nothing_is_left_to_fill_in(name: str) -> None:
    for item in overlay(name):
        for path, value in leaves(item):
            every_namespace = path.endswith("namespaceSelector") and value == {}
            assert every_namespace or value not in ("", {}, []), path
            assert "RECIPE" not in str(value), path


def leaves(value: object, path: str = "") -> list[tuple[str, object]]:
    children = (
        value.items() if isinstance(value, dict)
        else enumerate(value) if isinstance(value, list) else ()
    )  # fmt: skip
    found = [leaf for key, child in children for leaf in leaves(child, f"{path}/{key}")]
    return found or [(path, value)]


def test_templates_and_values_are_not_applied() -> None:
    for name in OVERLAYS:
        names = {item["metadata"]["name"] for item in overlay(name)}
        assert not names & {"template", "values", "hardware"}


def test_values_can_be_kept_outside_of_this_repository(tmp_path: Path) -> None:
    values = {"image": "here/phi4ray:1", "ingressNamespace": "edge"}
    objects = with_values(tmp_path, "h200/service", **values)
    [cluster] = clusters(objects)
    assert {container(group)["image"] for group in groups(cluster)} == {"here/phi4ray:1"}
    assert "'kubernetes.io/metadata.name': 'edge'" in str(of_kind(objects, "NetworkPolicy"))


def test_every_value_is_used() -> None:
    values = yaml.safe_load((K8S / "base" / "values.yaml").read_text())["data"]
    texts = "".join(path.read_text() for path in K8S.rglob("kustomization.yaml"))
    assert [key for key in values if f"data.{key}}}" not in texts and f"[{key}]" not in texts] == []


def test_the_documented_permissions_are_those_that_the_object_store_is_asked_with() -> None:
    actions = {
        "get_paginator": "ListBucket", "head_object": "GetObject", "get_object": "GetObject",
        "put_object": "PutObject", "upload_fileobj": "PutObject", "delete_object": "DeleteObject",
        "create_multipart_upload": "PutObject", "upload_part": "PutObject",
        "complete_multipart_upload": "PutObject", "abort_multipart_upload": "AbortMultipartUpload",
    }  # fmt: skip
    used = re.findall(r"_client\.(\w+)\(", (ROOT / "phi4ray" / "storage" / "s3.py").read_text())
    told = re.findall(r"`s3:(\w+)`", (ROOT / "docs" / "operations.md").read_text())
    assert set(told) == {actions[name] for name in used if name != "cache_clear"}


def test_the_gateways_of_an_incremental_upgrade_reach_the_serve_port_and_no_other(
    tmp_path: Path,
) -> None:
    [policy] = of_kind(composed(tmp_path, "options/incremental-upgrade"), "NetworkPolicy")
    [before] = of_kind(overlay("h200/service"), "NetworkPolicy")
    [added] = [rule for rule in policy["spec"]["ingress"] if rule not in before["spec"]["ingress"]]
    assert added["ports"] == [{"protocol": "TCP", "port": 8000}]
