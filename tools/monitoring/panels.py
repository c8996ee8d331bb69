"""How a dashboard of this repository looks: its variables, its rows, its graphs."""

import itertools
import string
from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    VariableOption,
    VariableRefresh,
)

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")

HERE = 'namespace=~"$namespace"'
"""The matcher of every selector: the namespaces that were chosen."""


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression, and how its series are called: Grafana's `{{label}}` template."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """A graph over time; `span` is its width out of 24. `latest` shows the newest values only."""

    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    span: int = 8
    latest: bool = False

    def build(self) -> timeseries.Panel | stat.Panel:
        """Build the panel of the SDK."""
        built: timeseries.Panel | stat.Panel
        if self.latest:
            newest = common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)
            built = stat.Panel().height(4).reduce_options(newest)
        else:
            legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST)
            tooltip = common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI)
            built = (
                timeseries.Panel()
                .height(8)
                .fill_opacity(10)
                .legend(legend.placement(LegendPlacement.BOTTOM).show_legend(True))
                .tooltip(tooltip.sort(SortOrder.DESCENDING))
            )
        built.title(self.title).description(self.description).unit(self.unit).min(0)
        built.span(self.span).datasource(SOURCE)
        for name, query in zip(string.ascii_uppercase, self.queries, strict=False):
            target = prometheus.Dataquery().ref_id(name).datasource(SOURCE)
            target.expr(query.expr).legend_format(query.legend)
            built.with_target(target.instant() if self.latest else target.range())
        return built


def variable(name: str, metric: str) -> dashboard.QueryVariable:
    """Let the reader choose among the values that a label of a metric has; at first all of them."""
    return (
        dashboard.QueryVariable(name)
        .id(name)
        .query(f"label_values({metric}, {name})")
        .datasource(SOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .current(VariableOption(text="All", value="$__all"))
    )


def quantiles(histogram: str, matchers: str = HERE) -> tuple[Query, ...]:
    """P50, P95 and P99 of a histogram, over all of its replicas."""
    rate = f"sum by (le) (rate({histogram}_bucket{{{matchers}}}[$__rate_interval]))"
    return tuple(
        Query(f"histogram_quantile({quantile}, {rate})", f"P{quantile * 100:g}")
        for quantile in (0.5, 0.95, 0.99)
    )


def new_dashboard(
    name: str,
    title: str,
    description: str,
    variables: Sequence[dashboard.QueryVariable],
    rows: Sequence[tuple[str, Sequence[Panel]]],
) -> dashboard.Dashboard:
    """Build a dashboard of rows of panels."""
    built = (
        dashboard.Dashboard(title)
        .uid(f"phi4ray-{name}")
        .description(description)
        .tags(["phi4ray"])
        .time("now-1h", "now")
        .refresh("30s")
        .readonly()
        .with_variable(
            dashboard.DatasourceVariable("datasource").id("datasource").type("prometheus")
        )
    )
    for one in variables:
        built.with_variable(one)
    ids = itertools.count(1)
    for heading, panels in rows:
        built.with_row(dashboard.Row(heading).id(next(ids)))
        for panel in panels:
            built.with_panel(panel.build().id(next(ids)))
    return built
