"""Monitoring as it is applied: rules, dashboards and who is scraped, as far as text can tell.

`tests/cluster/test_monitoring.py` holds the same expressions against a cluster that runs.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import promql_parser
import pytest
import yaml

from cluster.environment import SERVING
from phi4ray import exporter
from phi4ray.serve import metrics
from tests.manifests import (
    K8S,
    ROOT,
    Object,
    clusters,
    container,
    each_overlay,
    groups,
    needs_kustomize,
    of_kind,
    overlay,
    render,
)
from tests.promql import Selector, expressions, rules, selectors
from tools.monitoring.__main__ import files

FOLDER = K8S / "monitoring"
promtool = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(promtool is None, reason="promtool is not here")
ALERTS = [rule for rule in rules() if "alert" in rule]
each_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda rule: rule["alert"])


def test_generated_files_are_what_the_code_makes() -> None:
    stale = [path.name for path, text in files().items() if path.read_text() != text]
    assert stale == [], "run `make monitoring`"
    assert {path.name for path in (FOLDER / "dashboards").iterdir()} <= {p.name for p in files()}


def test_every_expression_is_promql() -> None:
    found = expressions()
    assert len(found) > 70
    for expression in found:
        promql_parser.parse(expression)


def test_the_parser_refuses_what_is_not() -> None:
    with pytest.raises(ValueError, match="expected type matrix"):
        promql_parser.parse("rate(x)")


def test_selectors_are_found_with_all_labels_that_an_expression_uses() -> None:
    found = selectors('sum by (a) (rate(x_total{b="c"}[5m])) / on (d) group_left (e) y or z')
    assert found == {
        Selector("x_total", frozenset({"a", "b"}), frozenset({("b", "=", "c")})),
        Selector("y", frozenset()),
        Selector("z", frozenset()),
    }


def test_a_selector_needs_its_labels_and_their_values() -> None:
    [selector] = selectors('sum by (a) (x{b=~"c.",d!="e"})')
    assert selector.selects({"a": "1", "b": "cc", "d": "2"})
    assert not selector.selects({"b": "cc", "d": "2"})
    assert not selector.selects({"a": "1", "b": "ccc", "d": "2"})
    assert not selector.selects({"a": "1", "b": "cc", "d": "e"})
    assert selector.selects({"a": "1", "b": "ccc", "d": "e"}, ignored={"b", "d"})


def ours() -> dict[str, set[str]]:
    """The labels of each series that `phi4ray.serve.metrics` makes."""
    found = {}
    for metric in vars(metrics).values():
        if isinstance(metric, prometheus_client.metrics.MetricWrapperBase):
            suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
            for suffix in suffixes.get(metric._type, ("",)):
                labels = {"le"} if suffix == "_bucket" else set()
                found[f"{metric._name}{suffix}"] = labels | set(metric._labelnames)
    return found


TARGET_LABELS = {"namespace", "instance", "job"}


def test_every_metric_of_ours_is_one_that_a_replica_has_with_these_labels() -> None:
    used = {one for text in expressions() for one in selectors(text) if one.name.startswith("phi4")}
    assert used
    known = ours()
    for selector in used:
        assert selector.labels - TARGET_LABELS <= known[selector.name], selector.name


def test_recorded_rules_are_made_before_they_are_used() -> None:
    made = {rule["record"] for rule in rules() if "record" in rule}
    used = {one.name for rule in rules() for one in selectors(rule["expr"])}
    assert {name for name in used if name.startswith("namespace:")} == made


@each_alert
def test_an_alert_has_a_runbook_that_is_there(alert: dict[str, Any]) -> None:
    path, _, anchor = alert["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE)
    # As GitHub makes anchors of headings.
    assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
    assert alert["labels"]["severity"] in ("critical", "warning")


def test_there_is_no_runbook_without_its_alert() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    headings = set(re.findall(r"^#+ (Phi4ray\w+)$", text, re.MULTILINE))
    assert headings == {rule["alert"] for rule in ALERTS}


@needs_promtool
def test_the_rules_do_what_their_unit_tests_say() -> None:
    command = [str(promtool), "test", "rules", str(FOLDER / "rules_test.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("arguments", ["rules rules.yaml --lint-fatal", "config prometheus.yaml"])
def test_promtool_has_nothing_to_say_about(arguments: str) -> None:
    kind, file, *flags = arguments.split()
    command = [str(promtool), "check", kind, *flags, str(FOLDER / file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_commands_for_a_prometheus_of_ones_own_serve_behind_haproxy() -> None:
    text = (FOLDER / "prometheus.yaml").read_text()
    environment, start, service, _ = re.findall(r"^#     (.+)$", text, re.MULTILINE)
    shell = f"unset {' '.join(SERVING)}; {environment}; env"
    python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", shell], cwd=ROOT, env={**os.environ, "PATH": python},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert {f"{name}={value}" for name, value in SERVING.items()} <= set(done.stdout.splitlines())
    assert start.startswith("ray start --head ")
    # Else the service would start a cluster of its own.
    assert service.startswith("RAY_ADDRESS=127.0.0.1:6379 python jobs/serve.py ")


def test_every_alert_has_a_unit_test() -> None:
    text = (FOLDER / "rules_test.yaml").read_text()
    assert [rule["alert"] for rule in ALERTS if rule["alert"] not in text] == []


def dashboards() -> Iterator[dict[str, Any]]:
    for path in sorted((FOLDER / "dashboards").glob("*.json")):
        yield json.loads(path.read_text())


def test_panels_are_told_apart_say_what_they_show_and_lie_on_no_other() -> None:
    found = list(dashboards())
    assert len({board["uid"] for board in found}) == len(found) == 3
    for board in found:
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            at = panel["gridPos"]
            cells = {
                (at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])
            }  # fmt: skip
            assert not taken & cells, panel["title"]
            assert max(x for x, _ in cells) < 24
            taken |= cells
            assert panel["type"] == "row" or panel["description"]


def test_every_panel_shows_the_namespace_that_was_chosen() -> None:
    for board in dashboards():
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                for selector in selectors(target["expr"].replace("$__rate_interval", "1m")
                                          .replace("$__range", "1h")):  # fmt: skip
                    assert "namespace" in selector.labels, target["expr"]


@needs_kustomize
def test_what_is_applied_has_the_rules_the_dashboards_and_the_pod_monitors() -> None:
    objects = render(FOLDER)
    assert {item["metadata"]["namespace"] for item in objects} == {"monitoring"}
    assert all(item["metadata"]["labels"]["release"] for item in objects)
    [boards] = of_kind(objects, "ConfigMap")
    assert boards["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert [json.loads(text) for _, text in sorted(boards["data"].items())] == [
        json.loads(path.read_text()) for path in sorted((FOLDER / "dashboards").iterdir())
    ]
    assert len(json.dumps(boards)) < 1_000_000  # what Kubernetes lets an object have
    [rule] = of_kind(objects, "PrometheusRule")
    assert rule["apiVersion"] == "monitoring.coreos.com/v1"
    assert rule["spec"] == yaml.safe_load((FOLDER / "rules.yaml").read_text())
    for monitor in of_kind(objects, "PodMonitor"):
        assert set(monitor["spec"]) == {
            "namespaceSelector", "selector", "podTargetLabels", "podMetricsEndpoints",
        }  # fmt: skip


@needs_kustomize
@pytest.mark.slow
@each_overlay
def test_pod_monitors_name_ports_that_pods_have_and_prometheus_may_reach(name: str) -> None:
    objects = overlay(name)
    [policy] = of_kind(objects, "NetworkPolicy")
    reachable = {port["port"] for port in policy["spec"]["ingress"][3]["ports"]}
    monitors = [one["spec"] for one in of_kind(render(FOLDER), "PodMonitor")]
    monitored: set[int] = set()
    for cluster in clusters(objects):
        for group in groups(cluster):
            ports = {port["name"]: port["containerPort"] for port in container(group)["ports"]}
            head = group is cluster["headGroupSpec"]
            found = [one for one in monitors if matches(one["selector"], group, head)]
            assert found
            monitored |= {ports[end["port"]] for one in found for end in one["podMetricsEndpoints"]}
    serves = name.endswith(("/service", "/fleet"))
    assert monitored == (reachable if serves else reachable - {PROXY})
    assert PROXY in reachable


PROXY = 9101  # RAY_SERVE_HAPROXY_METRICS_PORT


def matches(selector: Object, group: Object, head: bool) -> bool:
    """Whether pods of a group are selected, with the label that KubeRay adds."""
    kind = {"ray.io/node-type": "head" if head else "worker"}
    labels = {**group["template"]["metadata"]["labels"], **kind}
    expressions = [
        labels.get(one["key"]) in one.get("values", [labels.get(one["key"])])
        for one in selector.get("matchExpressions", ())
    ]
    return selector["matchLabels"].items() <= labels.items() and all(expressions)


def test_replicas_export_where_they_are_scraped() -> None:
    base = yaml.safe_load((K8S / "base" / "raycluster.yaml").read_text())
    [workers] = base["spec"]["workerGroupSpecs"]
    ports = {port["name"]: port["containerPort"] for port in container(workers)["ports"]}
    assert ports["replica-metrics"] == exporter.PORTS[0]
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    [replica] = [one for one in config["scrape_configs"] if one["job_name"] == "phi4ray-replica"]
    targets = [int(one.rpartition(":")[2]) for one in replica["static_configs"][0]["targets"]]
    assert targets == list(exporter.PORTS)[: len(targets)]


def test_jobs_have_the_same_names_in_kubernetes_and_elsewhere() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    named = {one["job_name"] for one in config["scrape_configs"]}
    text = Path(FOLDER / "podmonitors.yaml").read_text()
    assert set(re.findall(r"replacement: ([\w-]+)", text)) == named
