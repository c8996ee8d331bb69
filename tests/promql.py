"""Which series an expression selects, and by which labels; read with a PromQL parser."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import promql_parser as promql
import yaml

from tests.manifests import K8S

FOLDER = K8S / "monitoring"
GRAFANA = {"$__rate_interval": "1m", "$__range": "1h", "$namespace": ".*", "$output": ".*",
           "$tenant": ".*"}  # fmt: skip


@dataclass(frozen=True)
class Selector:
    """A metric, the labels by which an expression groups or matches it, and their matchers.

    A matcher is a label, `=`, `!=`, `=~` or `!~`, and a value.
    """

    name: str
    labels: frozenset[str]
    matchers: frozenset[tuple[str, str, str]] = frozenset()

    def selects(self, labels: Mapping[str, str], ignored: Collection[str] = ()) -> bool:
        """Whether a series with these labels is one; `ignored` ones may have any value."""
        if not all(labels.get(label) is not None for label in self.labels):
            return False
        tests = {
            "=": lambda value, wanted: value == wanted,
            "!=": lambda value, wanted: value != wanted,
            "=~": lambda value, wanted: re.fullmatch(wanted, value) is not None,
            "!~": lambda value, wanted: re.fullmatch(wanted, value) is None,
        }
        return all(
            label in ignored or tests[op](labels[label], value)
            for label, op, value in self.matchers
        )


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[str]:
    """The expressions of the dashboards, their variables' too, with Grafana's own filled in."""
    found = []
    for path in sorted((FOLDER / "dashboards").glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            found += [target["expr"] for target in panel.get("targets", ())]
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
                assert asked
                found.append(f"count by ({asked[2]}) ({asked[1]})")
    return [filled(text) for text in found]


def filled(expression: str) -> str:
    for name, value in GRAFANA.items():
        expression = expression.replace(name, value)
    return expression


def expressions() -> list[str]:
    return sorted({*panels(), *(rule["expr"] for rule in rules())})


def selectors(expression: str) -> set[Selector]:
    """What an expression selects, with labels of matchers, and of `by` of the sums around it."""
    found: set[Selector] = set()
    _collect(promql.parse(expression), frozenset(), found)
    return found


def operator(op: promql.MatchOp) -> str:
    operators = {"Equal": "=", "NotEqual": "!=", "Re": "=~", "NotRe": "!~"}
    return next(text for name, text in operators.items() if op == getattr(promql.MatchOp, name))


def _collect(node: Any, grouped: frozenset[str], found: set[Selector]) -> None:
    match node:
        case promql.VectorSelector():
            matchers = frozenset(
                (one.name, operator(one.op), one.value) for one in node.matchers.matchers
            )
            labels = grouped | {label for label, _, _ in matchers}
            found.add(Selector(node.name, labels, matchers))
        case promql.MatrixSelector():
            _collect(node.vector_selector, grouped, found)
        case promql.AggregateExpr():
            labels = node.modifier.labels if node.modifier else ()
            _collect(node.expr, grouped | set(labels), found)
        case promql.BinaryExpr():
            _collect(node.lhs, grouped, found)
            _collect(node.rhs, grouped, found)
        case promql.Call():
            for argument in node.args:
                _collect(argument, grouped, found)
        case promql.ParenExpr() | promql.SubqueryExpr() | promql.UnaryExpr():
            _collect(node.expr, grouped, found)
        case promql.NumberLiteral() | promql.StringLiteral():
            pass
        case _:
            raise AssertionError(f"unknown node: {node!r}")
