"""Write what is generated in `k8s/monitoring/`: dashboards and rules."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from tools.monitoring import batch, fleet, rules, tenants

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "k8s" / "monitoring"
DASHBOARDS = {"fleet": fleet.build, "batch": batch.build, "tenants": tenants.build}


def files() -> Mapping[Path, str]:
    """What each generated file holds."""
    groups = {"groups": list(rules.groups())}
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "phi4ray"},
        "spec": groups,
    }
    found = {
        FOLDER / "rules.yaml": _yaml(groups),
        FOLDER / "prometheusrule.yaml": _yaml(resource),
    }
    for name, build in DASHBOARDS.items():
        text = JSONEncoder(sort_keys=True, indent=2).encode(build().build())
        found[FOLDER / "dashboards" / f"{name}.json"] = f"{text}\n"
    return found


def _yaml(content: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(content), sort_keys=False, width=100, allow_unicode=True)
    return f"# Written by `make monitoring` from tools/monitoring/rules.py.\n{text}"


def main() -> None:
    """Write them."""
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
